"""The norms of telemetry are those of one process under any sharding, and travel in the all-reduce that is there."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer

from .. import threads
from . import given

FAST = ("ddp", "fsdp2", "hsdp", "tp", "fsdp1-flat", "pipeline")
CLIP = 20.0  # the gradients' norm is about 30
SETTINGS: dict[str, tuple[type[AlphaOptimizer], dict[str, Any]]] = {
    "exact": (AlphaAdam, {}),
    "delayed": (AlphaAdam, {"sync": "delayed", "fused": True}),
    "layer": (AlphaLion, {"scope": "layer"}),
    "threshold, clipped": (AlphaSGD, {"threshold": 0.1, "clip_norm": CLIP}),
    "clipped": (AlphaLion, {"clip_norm": CLIP, "fused": True}),
    "no masks": (AlphaAdam, {"gamma": 1.0}),
    "no masks, clipped": (AlphaSGD, {"gamma": 1.0, "clip_norm": CLIP}),
    "bf16 state": (AlphaAdam, {"state_dtype": "bfloat16"}),
    "bf16 state, delayed": (AlphaLion, {"state_dtype": "bfloat16", "sync": "delayed", "fused": True}),
}
CASES = [
    pytest.param(regime, setting, marks=() if regime in FAST else pytest.mark.slow)
    for regime, (setting, (_, options)) in product(given.REGIMES | given.FURTHER, SETTINGS.items())
    if regime != "plain" and not (regime in ("fsdp1-original", "by-hand") and "state_dtype" in options)  # refused
]


def played(regime: str, setting: str) -> list[dict[str, Any]]:
    kind, options = SETTINGS[setting]
    sharding = (given.REGIMES | given.FURTHER)[regime]
    return threads.run(sharding[0], given.run, regime, {**options, "telemetry": True}, steps=4, kind=kind)


@cache
def alone(setting: str) -> list[list[float | None]]:
    """One process, whose norms tests/unit/test_telemetry.py compares with plain differences."""
    norms: list[list[float | None]] = played("plain", setting)[0]["norms"]
    return norms


@pytest.mark.parametrize(("regime", "setting"), CASES)
def test_the_norms_are_one_processs(regime: str, setting: str) -> None:
    """Replicas, tied parameters and frozen ones counted as there; one all-reduce a step, as without telemetry.

    But for gamma=1, which sends nothing else. The sums of a clipped step's norm differ in their order, so its
    parameters may in their last bit.
    """
    options = SETTINGS[setting][1]
    rel = 1e-5 if "clip_norm" in options else 1e-12
    number = 0 if regime in given.REPLICATED else 1 + ("clip_norm" in options and "threshold" in options)
    for result in played(regime, setting):
        for ours, one in zip(result["norms"], alone(setting), strict=True):
            assert ours == [norm and pytest.approx(norm, rel=rel) for norm in one]
        assert result["collectives"][1:] == [["AllReduce"] * number] * 3


def test_the_norms_move() -> None:
    """Else equality would show nothing."""
    for setting in SETTINGS:
        gradients, updates = zip(*alone(setting), strict=True)
        known = [norm for norm in updates if norm is not None]
        assert len(known) == (4 if setting.endswith("delayed") or setting == "no masks" else 3)
        assert len({*gradients, *known}) == len(gradients) + len(known)
        assert min(gradients) > CLIP
