"""A tiny Llama learns the same under every sharding, as closely as AdamW does.

Gradients differ in their last bits between shardings, so a sign may flip where one is all but zero. Alphas and counts
must be equal on all ranks; against one process the parameters are compared.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from .. import threads
from ..marks import nightly_but
from . import llamas, pieces
from .given import SETTINGS

BAR = 5e-6
REPLICATED = ("ddp",)


@cache
def run(regime: str, setting: str | None) -> list[dict[str, Any]]:
    options = None if setting is None else SETTINGS[setting]
    return threads.run(llamas.REGIMES[regime].world, llamas.train, regime, options)


def whole(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return pieces.assemble([rank["params"] for rank in ranks], llamas.SHAPES)


@cache
def adamw_deviation(regime: str) -> float:
    return llamas.deviation(whole(run(regime, None)), whole(run("plain", None)))


MIXED = ("exact-0.1", "delayed-0.0", "layer-0.0")
MIXTURES = ("tp2-fsdp2-norms-plain", "tp2-fsdp2-norms-dtensor", "hsdp-tp")  # seconds each; test_given.py has all six
CASES = [
    case
    for regime in llamas.REGIMES
    for case in nightly_but([(regime, setting) for setting in (MIXED if regime in MIXTURES else SETTINGS)], every=3)
    if regime != "plain"
]


@pytest.mark.slow
@pytest.mark.parametrize(("regime", "setting"), CASES)
def test_twenty_steps(regime: str, setting: str) -> None:
    ranks, alone = run(regime, setting), run("plain", setting)
    assert all(rank["seen"] == ranks[0]["seen"] for rank in ranks), "alphas and counts are the same bits on all ranks"
    evidence = [[counts["evidence_fraction"] for _, counts in held[0]["seen"]] for held in (ranks, alone)]
    assert evidence[0] == pytest.approx(evidence[1], rel=1e-3)

    theirs = [len(step) for step in run(regime, None)[0]["collectives"]]
    ours = [len(step) for step in ranks[0]["collectives"]]
    # AdamW reduces the Partial gradients that sequence parallelism leaves at norms, and so must we
    assert all(n <= base + 1 for n, base in zip(ours[1:], theirs[1:], strict=True)), (ours, theirs)
    if regime != "tp-sequence":
        assert set(ours[1:]) == {0 if regime in REPLICATED else 1}

    deviation = llamas.deviation(whole(ranks), whole(alone))
    print(f"\n{regime} {setting}: {deviation:.1e} from one process; AdamW {adamw_deviation(regime):.1e}")
    assert deviation < BAR
    assert deviation > 0, "a run equal to one process by accident shows nothing"
