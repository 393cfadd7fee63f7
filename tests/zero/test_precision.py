"""fp16 with a dynamic loss scale: skipped steps change nothing, and thresholds see true gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import Given
from tests.older import deepspeed_has_bf16_masters
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_equality import OPTIONS, assert_equal

pytestmark = pytest.mark.slow

FP16 = {
    "zero1": engine.config(1, "fp16"),
    "zero2": engine.config(2, "fp16"),
    "zero2-offload": engine.config(2, "fp16", offload=True),
    "zero3": engine.config(3, "fp16", sub_group_size=200),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", FP16)
def test_an_overflow_storm_changes_nothing(ranks2: Ranks, mode: str, options: dict[str, Any]) -> None:
    """Moments, alpha, T and pending counts after skipped steps are those of a run that never had them."""
    storm = (3, 4, 5, 8)
    ranks = ranks2.run(engine.given, FP16[mode], options, overflow_at=storm)
    assert ranks[0]["skipped"] == len(storm)
    assert_equal(ranks, engine.given_alone(options, dtype=torch.float16, overflow_at=storm))


def test_an_overflow_storm_at_stage_zero(ranks2: Ranks) -> None:
    """DeepSpeed 0.19.8 divides stage-0 gradients by a loss scale that it never multiplied in; the rest is exact."""
    storm = (3, 4)
    ranks = ranks2.run(engine.given, engine.config(0, "fp16"), {}, overflow_at=storm)
    assert ranks[0]["skipped"] == len(storm)
    shrinks = [1 / after for _, after in ranks[0]["scales"]]
    assert_equal(ranks, engine.given_alone({}, dtype=torch.float16, overflow_at=storm, shrink=shrinks))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", FP16)
def test_a_growing_loss_scale(ranks2: Ranks, mode: str, options: dict[str, Any]) -> None:
    """DeepSpeed grows the scale before it unscales, which halves one step's gradients: the counts are of those."""
    config = {**FP16[mode], "fp16": {**FP16[mode]["fp16"], "loss_scale_window": 2}}
    ranks = ranks2.run(engine.given, config, options, shrink=2.0**-8)
    shrinks = [2.0**-8 * before / after for before, after in ranks[0]["scales"]]
    assert min(shrinks) == 2.0**-9, "the scale never grew"
    assert_equal(ranks, engine.given_alone(options, dtype=torch.float16, shrink=shrinks))


@pytest.mark.parametrize("mode", FP16)
def test_threshold_at_loss_scale_65536_with_clipping(ranks2: Ranks, mode: str) -> None:
    """The gradients compared with the moments are unscaled and clipped. On raw ones the counts are others."""
    options, clip, shrink = {"threshold": 0.1}, 0.01, 2.0**-9
    config = {
        **FP16[mode],
        "fp16": {**FP16[mode]["fp16"], "initial_scale_power": 16},
        "gradient_clipping": clip,
    }
    ranks = ranks2.run(engine.given, config, options, shrink=shrink)
    alone = engine.given_alone(options, dtype=torch.float16, clip=clip, shrink=shrink)
    assert ranks[0]["skipped"] == 0
    for result in ranks:
        assert result["seen"] == alone["seen"]
        for name, expected in alone["params"].items():  # the norm's summation order differs
            torch.testing.assert_close(result["params"][name], expected, rtol=1e-6, atol=1e-6)

    raw = ranks2.run(with_raw_gradients, config, options, shrink=shrink)
    assert raw[0]["seen"] != alone["seen"]


def factors(config: dict[str, Any], norms: list[float]) -> list[tuple[float, float]]:
    """For each norm what DeepSpeed multiplies a gradient of 1 by, and what counting multiplies it by."""
    from alphaadam_dist.zero import internals

    started = engine.start(Given(), config, {}, client=True, optimizer="AlphaAdam")
    zero, seen = started.optimizer, []
    for norm in norms:
        total = torch.tensor(norm)
        if started.zero_optimization_stage() == 3:
            flat = zero.fp32_partitioned_groups_flat[0]
            flat.grad = torch.ones_like(flat)
            type(zero).unscale_and_clip_grads(zero, 0, total)
            theirs, flat.grad = float(flat.grad[0]), None
        else:
            grad = torch.ones(3)
            type(zero).unscale_and_clip_grads(zero, [grad], total)
            theirs = float(grad[0])
        seen.append((theirs, float(internals.unscale_factor(zero, total))))
    started.destroy()
    return seen


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_factor_is_deepspeeds_for_every_norm(ranks2: Ranks, dtype: str, stage: int, clip: float) -> None:
    """Also for an invalid one, which is -1, and which bf16 without a check for overflow lets through."""
    norms = [0.0, 1e-8, 0.1, 77.7, 3e9, float("inf"), float("nan"), -1.0]
    for seen in ranks2.run(factors, {**engine.config(stage, dtype), "gradient_clipping": clip}, norms):
        theirs, ours = zip(*seen, strict=True)
        assert repr(ours) == repr(theirs)
        assert clip == 0.0 or len(set(ours)) > 3


def with_raw_gradients(*args: Any, **kwargs: Any) -> dict[str, Any]:
    from alphaadam_dist.zero import internals

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals, "unscale_factor", lambda zero, norm: 1.0)
        return engine.given(*args, **kwargs)


def multiplied(stage: int, *args: Any) -> list[int]:
    """How many elements each call of DeepSpeed's own unscaling was about."""
    from alphaadam_dist.zero import internals

    kind = internals.DeepSpeedZeroOptimizer_Stage3 if stage == 3 else internals.DeepSpeedZeroOptimizer
    unscale, seen = kind.unscale_and_clip_grads, []

    def noted(zero: Any, which: Any, total_norm: Any) -> None:
        grad = zero.fp32_partitioned_groups_flat[which].grad if stage == 3 else which[0]
        seen.append(grad.numel())
        unscale(zero, which, total_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "unscale_and_clip_grads", noted)
        engine.given(*args)
    return seen


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_gradients_are_unscaled_in_the_update_alone(ranks2: Ranks, stage: int, offload: bool) -> None:
    """That this changes no bit is what the equality tests say."""
    config = {**engine.config(stage, "bf16", offload=offload), "gradient_clipping": 0.3}
    for seen in ranks2.run(multiplied, stage, config, {}):
        assert set(seen) == {1}, "what it makes of a 1"


@deepspeed_has_bf16_masters
def test_bf16_gradients_are_rounded_as_deepspeed_does(ranks2: Ranks) -> None:
    masters = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config = {**engine.config(2, "bf16"), "gradient_clipping": 0.3, "bf16": masters}
    for seen in ranks2.run(multiplied, 2, config, {"state_dtype": "bfloat16"}):
        assert max(seen) > 1
