"""Save under ZeRO, start fresh processes, load, go on: bit for bit what never stopping gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.marks import nightly_but
from tests.models import tiny_llama, token_batches
from tests.ranks import Ranks
from tests.zero import engine

pytestmark = pytest.mark.slow

STEPS, SAVED_AFTER = 8, 4
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    f"{mode}-{name}": (config, options, "AlphaAdam")
    for mode, config in {
        "zero0": engine.config(0),
        "zero1": engine.config(1),
        "zero2": engine.config(2),
        "zero2-bf16": engine.config(2, "bf16"),
        "zero2-offload": engine.config(2, offload=True),
        "zero3": engine.config(3, sub_group_size=4000),
        "zero3-offload": engine.config(3, offload=True),
    }.items()
    for name, options in {
        "exact": {"alpha_warmup": 6},
        "delayed": {"sync": "delayed", "alpha_warmup": 6},
        "layer": {"scope": "layer"},
    }.items()
}
CASES |= {
    "zero2-lion": (engine.config(2), {"alpha_warmup": 6, "lr": 1e-3}, "AlphaLion"),
    "zero3-offload-lion": (engine.config(3, offload=True), {"sync": "delayed", "lr": 1e-3}, "AlphaLion"),
    "zero2-bf16-sgd": (engine.config(2, "bf16"), {"sync": "delayed"}, "AlphaSGD"),
    "zero3-sgd": (engine.config(3, sub_group_size=4000), {"alpha_warmup": 6, "nesterov": True}, "AlphaSGD"),
}


def run(case: str, folder: str, *, save: bool = False, load: bool = False) -> dict[str, Any]:
    ds_config, options, optimizer = CASES[case]
    started = engine.start(tiny_llama(seed=1 if load else 0), ds_config, options, client=True, optimizer=optimizer)
    if load:
        path, _ = started.load_checkpoint(folder, tag=case)
        assert path is not None
    alpha_at_start = started.basic_optimizer.alpha
    seen = []
    for step, batch in enumerate(token_batches(STEPS, 4)):
        if load and step < SAVED_AFTER:
            continue
        mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
        started.backward(started(input_ids=mine, labels=mine).loss)
        started.step()
        if save and step + 1 == SAVED_AFTER:
            started.save_checkpoint(folder, tag=case)
        seen.append(engine.observe(started.basic_optimizer))
    started.basic_optimizer._publish()  # a state_dict would need the partitions that ZeRO-3 takes out of the groups
    result = {
        "params": engine.masters(started),
        "seen": seen,
        "alpha_at_start": alpha_at_start,
        "state": started.basic_optimizer.param_groups[0]["alphaadam_state"],
    }
    started.destroy()
    return result


@pytest.fixture(scope="module")
def others() -> Iterator[Ranks]:
    """Processes that save; those that load are not the same."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("case", nightly_but(CASES, every=5))
def test_resumed_equals_uninterrupted(ranks2: Ranks, others: Ranks, tmp_path: Path, case: str) -> None:
    uninterrupted = others.run(run, case, str(tmp_path), save=True)
    for resumed, straight in zip(ranks2.run(run, case, str(tmp_path), load=True), uninterrupted, strict=True):
        assert resumed["seen"] == straight["seen"][SAVED_AFTER:]
        if "layer" not in case:  # alphas by layer are not kept
            assert resumed["alpha_at_start"] == straight["seen"][SAVED_AFTER - 1][0]
        assert resumed["state"] == straight["state"]
        assert resumed["state"][0] == STEPS
        for name, expected in straight["params"].items():
            assert torch.equal(resumed["params"][name], expected), name
