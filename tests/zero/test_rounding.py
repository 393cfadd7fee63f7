"""bf16 state under ZeRO, with fp32 masters and with DeepSpeed's own bf16 masters: one process, bit for bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from alphaadam_dist import AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer
from tests.marks import nightly_but
from tests.older import deepspeed_has_bf16_masters
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import assert_equal

STATE: dict[str, Any] = {"state_dtype": "bfloat16"}
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {}, "delayed": {"sync": "delayed"}, "layer": {"scope": "layer", "gamma": 0.2},
    "threshold": {"threshold": 0.1, "rounding_seed": 7},
}  # fmt: skip
MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def bf16(stage: int, **options: Any) -> dict[str, Any]:
    return {**engine.config(stage, "bf16", **options), "bf16": MASTERS}


FP32_MASTERS = {
    "zero0": engine.config(0),
    "zero0-bf16": engine.config(0, "bf16"),
    "zero1": engine.config(1),
    "zero1-bf16-fp32-accumulation": {**engine.config(1, "bf16"), "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2": engine.config(2),
    "zero2-round-robin": engine.config(2, round_robin_gradients=True),
    "zero2-bf16-offload": engine.config(2, "bf16", offload=True),
    "zero3-sub-groups": engine.config(3, sub_group_size=200),
    "zero3-bf16-offload": engine.config(3, "bf16", offload=True, sub_group_size=200),
}
BF16_MASTERS = {
    "zero1": bf16(1),
    "zero1-offload": bf16(1, offload=True),
    "zero2": bf16(2),
    "zero2-round-robin": bf16(2, round_robin_gradients=True),
    "zero2-accumulate": bf16(2, accumulate=2),
    "zero2-offload": bf16(2, offload=True),
    "zero3": bf16(3),
    "zero3-sub-groups": bf16(3, sub_group_size=200),
    "zero3-offload": bf16(3, offload=True, sub_group_size=200),
}
slow = pytest.mark.slow


@slow
@pytest.mark.parametrize(("setting", "mode"), nightly_but(product(OPTIONS, FP32_MASTERS), every=2))
def test_with_fp32_masters(ranks2: Ranks, mode: str, setting: str) -> None:
    options = {**OPTIONS[setting], **STATE}
    dtype = torch.bfloat16 if "bf16" in mode else torch.float32
    ranks = ranks2.run(engine.given, FP32_MASTERS[mode], options)
    assert_equal(ranks, engine.given_alone(options, dtype=dtype))


@deepspeed_has_bf16_masters
@slow
@pytest.mark.parametrize(("setting", "mode"), nightly_but(product(OPTIONS, BF16_MASTERS), every=2))
def test_with_bf16_masters(ranks2: Ranks, mode: str, setting: str) -> None:
    options = {**OPTIONS[setting], **STATE}
    ranks = ranks2.run(engine.given, BF16_MASTERS[mode], options)
    assert_equal(ranks, engine.given_alone(options, dtype=torch.bfloat16, masters=torch.bfloat16))


@deepspeed_has_bf16_masters
@slow
@pytest.mark.parametrize("kind", [AlphaLion, AlphaSGD])
@pytest.mark.parametrize("mode", ["zero2", "zero3-offload"])
def test_the_family_on_the_fast_kernels(ranks2: Ranks, mode: str, kind: type[AlphaOptimizer]) -> None:
    options = {**STATE, "sync": "delayed", "fused": True}
    ranks = ranks2.run(engine.given, BF16_MASTERS[mode], options, optimizer=kind.__name__, client=False)
    alone = engine.given_alone(options, dtype=torch.bfloat16, masters=torch.bfloat16, optimizer=kind, client=False)
    assert_equal(ranks, alone)


@deepspeed_has_bf16_masters
@slow
@pytest.mark.parametrize("mode", ["zero1", "zero2-offload", "zero3-sub-groups"])
def test_four_ranks(ranks4: Ranks, mode: str) -> None:
    ranks = ranks4.run(engine.given, BF16_MASTERS[mode], STATE)
    assert_equal(ranks, engine.given_alone(STATE, dtype=torch.bfloat16, masters=torch.bfloat16))


@slow
def test_a_skipped_step_rounds_nothing(ranks2: Ranks) -> None:
    """n stands still in it, as everything does."""
    storm = (3, 4, 8)
    ranks = ranks2.run(engine.given, engine.config(2, "fp16"), STATE, overflow_at=storm)
    assert ranks[0]["skipped"] == len(storm)
    assert_equal(ranks, engine.given_alone(STATE, dtype=torch.float16, overflow_at=storm))


@deepspeed_has_bf16_masters
@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ({"bf16_master_weights_and_grads": True}, STATE, "bf16_optimizer_states to true as well, or both to false"),
        ({k: v for k, v in MASTERS.items() if k != "enabled"}, {}, 'state_dtype=None.*"state_dtype": "bfloat16"'),
    ],
)
def test_flags_that_contradict_the_option_are_refused(
    ranks2: Ranks, flags: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config = {**engine.config(2, "bf16"), "bf16": {"enabled": True, **flags}}
    with pytest.raises(RankError, match=message):
        ranks2.run(engine.given, config, options)


def test_nvme_is_refused(ranks2: Ranks) -> None:
    """Its buffers have the masters' dtype, and bf16 moments would be read as fp32."""
    config = engine.config(3)
    config["zero_optimization"]["offload_optimizer"] = {"device": "nvme", "nvme_path": "/tmp"}
    config["zero_force_ds_cpu_optimizer"] = False
    with pytest.raises(RankError, match=r"device='nvme' with state_dtype='bfloat16': .* offload to 'cpu'"):
        ranks2.run(engine.given, config, {**STATE, "sync": "delayed"})


@deepspeed_has_bf16_masters
def test_a_threshold_with_clipped_bf16_gradients_is_refused(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match=r"threshold=0\.1 and gradient_clipping=1\.0: .*set threshold or"):
        ranks2.run(engine.given, {**bf16(2), "gradient_clipping": 1.0}, {**STATE, "threshold": 0.1})
