"""Settings of DeepSpeed with each stage: one process's bits, or an error that says why not, ours or DeepSpeed's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups

from tests.cells import Cell, impossible, refused, served
from tests.models import Given, given_gradients
from tests.older import since_deepspeed
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import assert_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_ranks_afterwards"),
    since_deepspeed("0.17.2", "lacks some of these settings"),
]


def autocast(stage: int, dtype: str) -> dict[str, Any]:
    return {**engine.config(stage), "torch_autocast": {"enabled": True, "dtype": dtype}}


SCALER = "clips before its GradScaler unscales, and lowers the scale at no overflow"
ULYSSES: dict[int, Cell] = {stage: served() for stage in range(4)}
CELLS: dict[str, dict[int, Cell]] = {
    "`torch_autocast`, bf16": {stage: served(autocast(stage, "bfloat16")) for stage in range(4)},
    "`torch_autocast`, fp16": {
        0: served(autocast(0, "float16")),
        **{
            stage: refused(
                r"torch_autocast with dtype float16 at stage \d: .* use dtype bfloat16",
                SCALER,
                autocast(stage, "float16"),
            )
            for stage in (1, 2, 3)
        },
    },
    "`offload_optimizer.ratio` below 1": {
        **{
            stage: impossible(
                "Partial offloading only supported for ZeRO Stage 3",
                "for stage 3 only",
                engine.offload(stage, ratio=0.5),
            )
            for stage in (1, 2)
        },
        3: impossible(
            "Hybrid Optimizer Only Supports DeepSpeedCPUAdam",
            "takes DeepSpeedCPUAdam only",
            engine.offload(3, ratio=0.5),
        ),
    },
    "hpZ (`zero_hpz_partition_size`)": {3: served(engine.config(3, zero_hpz_partition_size=2, sub_group_size=200))},
    "qgZ (`zero_quantized_gradients`), one node": {3: served(engine.config(3, zero_quantized_gradients=True))},
    "Ulysses (`mpu=parallel_state_sp`)": ULYSSES,
}


def forget_autocast() -> None:
    """DeepSpeed keeps it for every later engine of the process."""
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None


def given(config: dict[str, Any], options: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    try:
        return engine.given(config, options, **arguments)
    finally:
        forget_autocast()


@pytest.mark.parametrize(
    ("row", "stage"), [(row, stage) for row, cells in CELLS.items() for stage in cells if cells is not ULYSSES]
)
def test_with_each_stage(ranks2: Ranks, row: str, stage: int) -> None:
    cell = CELLS[row][stage]
    if cell.verdict == "served":
        for options in ({}, {"threshold": 0.1}):
            assert_equal(ranks2.run(given, cell.given, options), engine.given_alone(options))
        return
    optimizer = "AdamW" if cell.verdict == "impossible" else "AlphaAdam"
    with pytest.raises(RankError, match=cell.says):
        ranks2.run(given, cell.given, {}, optimizer=optimizer)


def test_an_overflow_under_autocast_in_fp16(ranks2: Ranks) -> None:
    ranks = ranks2.run(given, autocast(0, "float16"), {}, overflow_at=(2, 5))
    assert_equal(ranks, engine.given_alone({}, overflow_at=(2, 5)))


def scale_after_an_overflow(stage: int) -> float:
    """torch's AdamW where one element of the gradient overflows."""
    started = engine.start(Given(), autocast(stage, "float16"), {}, True, "AdamW")
    scaler = started.optimizer.torch_autocast_gradscaler
    (gradients,) = given_gradients(1)
    gradients["embedding"][0, 0] = float("inf")
    try:
        started.backward(started(gradients))
        before = float(scaler.get_scale())
        started.step()
        assert started.skipped_steps == 1
        return float(scaler.get_scale()) / before
    finally:
        started.destroy()
        forget_autocast()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_why_autocast_in_fp16_is_refused(ranks2: Ranks, stage: int) -> None:
    """Every later step would overflow, too. If this fails DeepSpeed halves the scale: look whether it clips right."""
    assert ranks2.run(scale_after_an_overflow, stage) == [1.0, 1.0]


def elastic(stage: int, folder: str) -> None:
    """torch's AdamW."""
    started = engine.start(Given(), engine.config(stage, elastic_checkpoint=True), {}, True, "AdamW")
    started.backward(started(given_gradients(1)[0]))
    started.step()
    started.save_checkpoint(folder, tag="t")
    started.load_checkpoint(folder, tag="t")


@pytest.mark.parametrize("stage", [1, 2])
def test_why_elastic_checkpoints_are_refused(ranks2: Ranks, tmp_path: Path, stage: int) -> None:
    """If this fails DeepSpeed loads what it saves."""
    with pytest.raises(RankError, match="assert BASE_OPTIMIZER_STATE_STEP in all_state_dict"):
        ranks2.run(elastic, stage, str(tmp_path))


# ---- Ulysses: ranks that share a sequence share the gradients too


def ulysses(config: dict[str, Any], options: dict[str, Any], mesh: bool) -> dict[str, Any]:
    deepspeed.init_distributed("gloo")
    ways: dict[str, Any] = {"mesh_param": (2, 2)}
    if not mesh:
        parallel_state_sp._release_sequence_parallel_groups()
        parallel_state_sp.initialize_sequence_parallel(2)
        ways = {"mpu": parallel_state_sp}
    try:
        return engine.given(config, options, **ways)
    finally:
        groups.mpu = groups.mesh_device = None  # or every later engine of the process would have them


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}], ids=["exact", "layer"])
@pytest.mark.parametrize("stage", list(ULYSSES))
def test_ulysses(ranks4: Ranks, stage: int, options: dict[str, Any]) -> None:
    """Two ranks share a sequence, each with its part of the gradient; DeepSpeed adds those up, but at stage 3."""
    ranks = ranks4.run(ulysses, engine.config(stage), options, False)
    assert_equal(ranks, engine.given_alone(options, shrink=1.0 if stage == 3 else 2.0))


def test_ulysses_over_a_mesh_is_refused(ranks4: Ranks) -> None:
    with pytest.raises(RankError, match=r"does not serve deepspeed\.initialize\(mesh_param=.*: give mpu=deepspeed"):
        ranks4.run(ulysses, engine.config(1), {}, True)
