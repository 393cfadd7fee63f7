"""DeepSpeed's universal checkpoints of bf16 state: other numbers of ranks go on with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from alphaadam_dist.zero.convert import convert as to_dcp
from tests.models import Given, given_gradients
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_rounding import FP32_MASTERS, STATE, bf16

from .test_universal import convert

pytestmark = pytest.mark.slow

STEPS, SAVED_AFTER = 10, 5
MODES = {
    "zero2": FP32_MASTERS["zero2"],
    "zero2-bf16-masters": bf16(2),
    "zero3-bf16-masters": bf16(3, sub_group_size=200),
}


def run(mode: str, folder: str, *, load: bool) -> dict[str, torch.Tensor]:
    """All steps with given gradients and a save on the way, or the rest after a load; the parameters."""
    config = {**MODES[mode], "checkpoint": {"load_universal": load}}
    started = engine.start(Given(), config, STATE, client=True, optimizer="AlphaAdam")
    if load:
        path, _ = started.load_checkpoint(folder, tag="universal")
        assert path is not None
    for step, gradients in enumerate(given_gradients(STEPS)):
        if load and step < SAVED_AFTER:
            continue
        started.backward(started(gradients))
        started.step()
        if step + 1 == SAVED_AFTER and not load:
            started.save_checkpoint(folder, tag="saved")
    params = engine.masters(started)
    started.destroy()
    return params


@pytest.mark.parametrize("mode", MODES)
def test_it_goes_on_with_more_ranks_and_with_fewer(ranks2: Ranks, ranks4: Ranks, tmp_path: Path, mode: str) -> None:
    dtype = torch.bfloat16 if "bf16" in mode else torch.float32
    alone = engine.given_alone(STATE, dtype=dtype, masters=dtype)["params"]
    ranks2.run(run, mode, str(tmp_path), load=False)
    convert(tmp_path)
    for ranks in (ranks2, ranks4):
        for held in ranks.run(run, mode, str(tmp_path), load=True):
            for name, expected in alone.items():
                assert torch.equal(held[name], expected), name


def test_it_becomes_a_dcp_checkpoint_of_its_numbers(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(run, "zero2-bf16-masters", str(tmp_path), load=False)
    convert(tmp_path)
    to_dcp(tmp_path / "universal", tmp_path / "dcp")
    held: dict[str, Any] = {"optimizer.state.weight.exp_avg": torch.zeros(16, 9)}
    dcp.load(held, checkpoint_id=tmp_path / "dcp", no_dist=True)
    moment = held["optimizer.state.weight.exp_avg"]
    assert torch.equal(moment, moment.bfloat16().float())
    assert float(moment.abs().sum()) > 0
