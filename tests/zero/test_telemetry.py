"""telemetry under DeepSpeed: the update's norm is that of the masters' differences, the gradient's is DeepSpeed's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.marks import slow_but
from tests.models import Given, given_gradients
from tests.older import deepspeed_has_bf16_masters
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_equality import MODES
from tests.zero.test_rounding import bf16

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "delayed": {"sync": "delayed", "fused": True},
    "no masks": {"gamma": 1.0},
    "threshold": {"threshold": 0.1, "scope": "layer"},
}
TESTED = (
    "zero0", "zero1", "zero2", "zero2-offload", "zero2-accumulate", "zero3-sub-groups", "zero3-offload", "zero0-bf16",
    "zero1-bf16-fp32-accumulation", "zero2-bf16-offload", "zero3-fp16",
)  # fmt: skip
CLIP = 1.0  # the gradients' norm is about 30


def norm_of(tensors: Any) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5


def measured(config: dict[str, Any], options: dict[str, Any], optimizer: str = "AlphaAdam") -> list[dict[str, Any]]:
    """Of each step the norms of its gradients, of the masters' differences, DeepSpeed's own, and what is told."""
    started = engine.start(Given(), config, {**options, "telemetry": True}, True, optimizer)
    before, seen = engine.masters(started), []
    for gradients in given_gradients(5):
        for _ in range(started.gradient_accumulation_steps()):
            started.backward(started(gradients))
            started.step()
        after = engine.masters(started)
        told, theirs = started.basic_optimizer.metrics(), started.get_global_grad_norm()
        seen.append({
            "gradient": norm_of(gradients.values()),
            "moved": norm_of(after[name].double() - before[name].double() for name in after),
            "theirs": None if theirs is None else float(theirs), "told": (told["grad_norm"], told["update_norm"]),
            "steps": told["steps"],
        })  # fmt: skip
        before = after
    started.destroy()
    return seen


def assert_right(ranks: list[list[dict[str, Any]]], *, late: bool, own: bool = False) -> None:
    """``late``: the update told is that of the step before. ``own``: DeepSpeed takes no norm, the optimizer its own."""
    for seen in ranks:
        moved: list[Any] = [step["moved"] for step in seen]
        assert min(moved) > 0
        assert [step["steps"] for step in seen] == [1, 2, 3, 4, 5]
        expected = [None, *moved[:-1]] if late else moved
        assert [step["told"][1] for step in seen] == [norm and pytest.approx(norm, rel=1e-12) for norm in expected]
        for step in seen:
            if own:  # after DeepSpeed has clipped
                assert step["theirs"] is None
                assert step["told"][0] == pytest.approx(CLIP, rel=1e-6)
            else:
                assert step["told"][0] == step["theirs"] == pytest.approx(step["gradient"], rel=1e-3)


@pytest.mark.parametrize("setting", OPTIONS)
@pytest.mark.parametrize("mode", slow_but(TESTED, "zero2", "zero3-sub-groups"))
def test_the_norms(ranks2: Ranks, mode: str, setting: str) -> None:
    """With DeepSpeed's clipping, whose gradients are scaled when the kernels see them."""
    config = {**MODES[mode], "gradient_clipping": CLIP}
    kinds = dict(zip(OPTIONS, ("AlphaAdam", "AlphaAdam", "AlphaLion", "AlphaSGD"), strict=True))
    ranks = ranks2.run(measured, config, OPTIONS[setting], kinds[setting])
    assert_right(ranks, late=setting in ("exact", "threshold"), own=mode == "zero0")


@pytest.mark.slow
@deepspeed_has_bf16_masters
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_masters_move_by_what_is_left_after_rounding(ranks2: Ranks, stage: int) -> None:
    options = {"sync": "delayed", "state_dtype": "bfloat16"}
    assert_right(ranks2.run(measured, bf16(stage), options), late=False)
