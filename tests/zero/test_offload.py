"""States on NVMe (`make test-nvme`), ZeRO++'s hierarchical partitions, and offload_states: one process's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer
from tests.models import Given, given_gradients
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import OPTIONS, assert_equal, dtype_of


@pytest.fixture(scope="module")
def async_io() -> None:
    """DeepSpeed's disk I/O, compiled before the ranks need it."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's NVMe offload needs libaio: apt-get install libaio-dev")
    AsyncIOBuilder().load(verbose=False)


@pytest.mark.nvme
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("async_io")
@pytest.mark.parametrize(
    ("kind", "dtype"), [(AlphaAdam, "fp32"), (AlphaAdam, "bf16"), (AlphaLion, "fp32"), (AlphaSGD, "bf16")]
)
def test_nvme_delayed(ranks2: Ranks, tmp_path: Path, kind: type[AlphaOptimizer], dtype: str) -> None:
    config = engine.config(3, dtype, offload=True, sub_group_size=200)
    config["zero_optimization"]["offload_optimizer"] |= {"device": "nvme", "nvme_path": str(tmp_path)}
    options = OPTIONS["delayed"]
    alone = engine.given_alone(options, optimizer=kind, dtype=dtype_of(dtype))
    assert_equal(ranks2.run(engine.given, config, options, optimizer=kind.__name__), alone)


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
