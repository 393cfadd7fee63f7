"""States on NVMe (`make test-nvme`), ZeRO++'s hierarchical partitions, and offload_states: one process's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer
from tests.cells import Cell, served
from tests.models import Given, given_gradients
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import OPTIONS, assert_equal, dtype_of

CELLS: dict[str, dict[int, Cell]] = {'NVMe offload, `sync="exact"` and `"delayed"`': {3: served()}}


@pytest.fixture(scope="module")
def async_io() -> None:
    """DeepSpeed's disk I/O, compiled before the ranks need it."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's NVMe offload needs libaio: apt-get install libaio-dev")
    AsyncIOBuilder().load(verbose=False)


def nvme(test: Any) -> Any:
    """Marks a test that compiles DeepSpeed's disk I/O first."""
    return pytest.mark.nvme(pytest.mark.timeout(3600)(pytest.mark.usefixtures("async_io")(test)))


class Large(Given):
    """Half of each matrix is more than a megabyte, below which DeepSpeed swaps nothing, and has an odd size."""

    EMBEDDING, WEIGHT = (1031, 701), (853, 703)


class Aligned(Large):
    """Its matrices may share a sub-group: where the second begins a disk's data can arrive."""

    EMBEDDING = (1031, 256)


PIPELINED = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}


def on_nvme(folder: Path, dtype: str = "fp32", **settings: Any) -> dict[str, Any]:
    """Each matrix a sub-group on disk, the rest one in memory."""
    config = engine.config(3, dtype, offload=True, sub_group_size=200_000)
    settings = {"device": "nvme", "nvme_path": str(folder), **settings}
    config["zero_optimization"]["offload_optimizer"] |= settings
    return config


@nvme
@pytest.mark.parametrize("setting", ["exact", "delayed", "layer", "threshold"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [(AlphaAdam, "fp32"), (AlphaAdam, "bf16"), (AlphaLion, "fp32"), (AlphaSGD, "bf16")]
)
def test_nvme(ranks2: Ranks, tmp_path: Path, kind: type[AlphaOptimizer], dtype: str, setting: str) -> None:
    options = OPTIONS[setting]
    alone = engine.given_alone(options, optimizer=kind, dtype=dtype_of(dtype), model=Large)
    ranks = ranks2.run(engine.given, on_nvme(tmp_path, dtype), options, optimizer=kind.__name__, model=Large)
    assert_equal(ranks, alone)


@nvme
@pytest.mark.parametrize("setting", ["exact", "delayed"])
@pytest.mark.parametrize("settings", [{}, PIPELINED], ids=["plain", "pipelined"])
def test_nvme_sub_groups(ranks2: Ranks, tmp_path: Path, settings: dict[str, Any], setting: str) -> None:
    """Two flats on disk, swapped one by one or with the next on its way; and two parameters in one flat."""
    options = OPTIONS[setting]
    config = on_nvme(tmp_path, **settings)
    assert_equal(ranks2.run(engine.given, config, options, model=Large), engine.given_alone(options, model=Large))
    config["zero_optimization"]["sub_group_size"] = 10**9
    assert_equal(ranks2.run(engine.given, config, options, model=Aligned), engine.given_alone(options, model=Aligned))


@nvme
def test_nvme_where_deepspeed_reads_nothing_is_refused(ranks2: Ranks, tmp_path: Path) -> None:
    config = on_nvme(tmp_path)
    config["zero_optimization"]["sub_group_size"] = 10**9
    with pytest.raises(RankError, match=r"begins at byte 1445464 of its sub-group, .* Set sub_group_size to 1"):
        ranks2.run(engine.given, config, {}, model=Large)


def unaligned_with_adamw(config: dict[str, Any]) -> bool:
    """Whether torch's AdamW meets the gradient that the second matrix has."""
    started = engine.start(Large(), config, {}, True, "AdamW")
    (gradients,) = given_gradients(1, like=Large())
    started.backward(started(gradients))
    seen = []
    unscale = started.optimizer.unscale_and_clip_grads
    started.optimizer.unscale_and_clip_grads = lambda i, norm: (
        seen.append(started.optimizer.fp32_partitioned_groups_flat[i].grad.clone()) or unscale(i, norm)
    )
    started.step()
    padded = -(-Large().weight.numel() // 2)
    mine = gradients["weight"].flatten()[: padded if dist.get_rank() == 0 else None].flatten()
    mine = mine if dist.get_rank() == 0 else mine[padded:]
    first = -(-Large().embedding.numel() // 2)
    started.destroy()
    return torch.equal(seen[0][first : first + len(mine)], mine)


@nvme
def test_why_it_is_refused(ranks2: Ranks, tmp_path: Path) -> None:
    """If this fails DeepSpeed reads gradients to any place."""
    config = on_nvme(tmp_path)
    config["zero_optimization"]["sub_group_size"] = 10**9
    config["zero_allow_untested_optimizer"] = True
    assert ranks2.run(unaligned_with_adamw, config) == [False, False]


def half(config: dict[str, Any], options: dict[str, Any], folder: str, second: bool) -> dict[str, Any]:
    """The first or second half of ``engine.given``, with a checkpoint between."""
    started, seen = engine.start(Large(), config, options, True, "AlphaAdam"), []
    if second:
        started.load_checkpoint(folder, tag="t")
    for gradients in given_gradients(10, like=Large())[5 if second else 0 : None if second else 5]:
        started.backward(started(gradients))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    if not second:
        started.save_checkpoint(folder, tag="t")
    result = {"params": engine.masters(started), "seen": seen}
    started.destroy()
    return result


@nvme
@pytest.mark.parametrize("setting", ["exact", "delayed"])
def test_nvme_goes_on_from_a_checkpoint(ranks2: Ranks, tmp_path: Path, setting: str) -> None:
    """In fresh processes, as DeepSpeed's names of files need it; elsewhere that is said."""
    options, config, saved = OPTIONS[setting], on_nvme(tmp_path), str(tmp_path / "saved")
    ranks2.restart()
    first = ranks2.run(half, config, options, saved, False)
    with pytest.raises(RankError, match=r"load into the first engine of a fresh process"):
        ranks2.run(half, config, options, saved, True)
    ranks2.restart()
    second = ranks2.run(half, config, options, saved, True)
    both = [{**b, "seen": a["seen"] + b["seen"]} for a, b in zip(first, second, strict=True)]
    assert_equal(both, engine.given_alone(options, model=Large))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hpz(ranks2: Ranks, options: dict[str, Any]) -> None:
    config = engine.config(3, zero_hpz_partition_size=2, sub_group_size=200)
    assert_equal(ranks2.run(engine.given, config, options), engine.given_alone(options))


def away_and_back(config: dict[str, Any], include: list[str] | None, folder: str) -> dict[str, Any]:
    """engine.offload_states between two steps, reload_states, and a checkpoint that is loaded anew in the end."""
    model = Given()
    del model.frozen  # DeepSpeed trips over it at stage 3: it takes the buffer of trained parameters for that of all
    started = engine.start(model, config, {}, True, "AlphaAdam")
    seen = []
    for i, gradients in enumerate(given_gradients(10)):
        if i in (3, 6):
            kinds = include and [OffloadStateTypeEnum(kind) for kind in include]
            started.offload_states(include=kinds, pin_memory=False)
            started.reload_states()
        if i == 7:
            started.save_checkpoint(folder, tag="t")
            started.load_checkpoint(folder, tag="t")
        started.backward(started(gradients))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    result = {"params": engine.masters(started), "seen": seen}
    started.destroy()
    return result


AWAY_AT_STAGE_3 = ["lp_params", "lp_grads", "contiguous_grad_buffer"]


@pytest.mark.parametrize(
    ("stage", "include"), [(1, None), (2, None), (3, AWAY_AT_STAGE_3)], ids=["zero1", "zero2", "zero3"]
)
def test_offload_states(ranks2: Ranks, tmp_path: Path, stage: int, include: list[str] | None) -> None:
    ranks = ranks2.run(away_and_back, engine.config(stage), include, str(tmp_path))
    assert_equal(ranks, engine.given_alone({}))


@pytest.mark.parametrize("include", [None, ["hp_params"], ["optim_states"]], ids=str)
def test_offload_states_that_deepspeed_keeps_to_its_own_adam(
    ranks2: Ranks, tmp_path: Path, include: list[str] | None
) -> None:
    """If this fails DeepSpeed serves others, too: say so in docs/deepspeed.md."""
    with pytest.raises(RankError, match="Offloading is supported only for DeepSpeed FusedAdam"):
        ranks2.run(away_and_back, engine.config(3), include, str(tmp_path))
