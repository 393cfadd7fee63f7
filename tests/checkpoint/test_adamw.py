"""AdamW, then AlphaAdam, then AdamW again in one run: only the optimizer's name in DeepSpeed's config changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from alphaadam_dist.zero import internals
from tests.marks import nightly_but
from tests.models import tiny_llama, token_batches
from tests.ranks import Ranks
from tests.zero import engine

pytestmark = pytest.mark.slow

CHANGES = (0, 3, 6, 8)
MODES = {"zero2": engine.config(2), "zero3": engine.config(3, sub_group_size=4000)}
GAMMA_1 = {"gamma": 1.0}  # the two are one algorithm, bit for bit


def leg(mode: str, kind: str, options: dict[str, Any], folder: str, number: int) -> dict[str, Any]:
    """Load what the leg before saved, train and save."""
    started = engine.start(tiny_llama(seed=number), MODES[mode], options, client=False, optimizer=kind)
    if number:
        path, _ = started.load_checkpoint(folder, tag=str(number - 1))
        assert path is not None
    loaded = state_of(started)
    for batch in token_batches(CHANGES[-1], 4)[CHANGES[number] : CHANGES[number + 1]]:
        mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
        started.backward(started(input_ids=mine, labels=mine).loss)
        started.step()
    started.save_checkpoint(folder, tag=str(number))
    result = {"loaded": loaded, "saved": state_of(started), "params": engine.masters(started)}
    started.destroy()
    return result


def state_of(started: Any) -> list[dict[str, Tensor]]:
    """Of each flat of this rank: the moments, the step, and the weights themselves."""
    held = []
    for flat in internals.wrapper_of(started).flats():
        state = {key: value.clone() for key, value in started.basic_optimizer.state[flat].items()}
        assert set(state) <= {"step", "exp_avg", "exp_avg_sq"}
        held.append({**state, "weights": flat.detach().clone()})
    return held


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key].cpu(), b[key].cpu()) for key in a)
        for a, b in zip(one, other, strict=True)
    )


def legs(ranks: Ranks, mode: str, folder: Path, *kinds: tuple[str, dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [ranks.run(leg, mode, kind, options, str(folder), i) for i, (kind, options) in enumerate(kinds)]


@pytest.mark.parametrize("mode", nightly_but(["zero3", "zero2"], every=2))
def test_there_and_back_in_one_run(ranks2: Ranks, tmp_path: Path, mode: str) -> None:
    adamw, ours = ("AdamW", {}), ("AlphaAdam", {})
    for options in ({}, GAMMA_1):
        run = legs(ranks2, mode, tmp_path / str(options), adamw, (ours[0], options), adamw)
        for before, after in itertools.pairwise(run):
            for rank in range(2):
                assert equal(after[rank]["loaded"], before[rank]["saved"])
        for flat in run[-1][0]["saved"]:
            assert float(flat["step"]) == CHANGES[-1]
    alone = legs(ranks2, mode, tmp_path / "alone", adamw, adamw, adamw)
    for name, expected in alone[-1][0]["params"].items():
        assert torch.equal(run[-1][0]["params"][name], expected), name
