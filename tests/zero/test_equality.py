"""Under ZeRO every count, every alpha and every parameter is that of one process, bit for bit.

The loss is sum(p * G), so the gradient is G on every rank and averaging over a power-of-two world is exact: nothing
but the sharding can make a difference.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.marks import nightly_but
from tests.ranks import Ranks
from tests.zero import engine

MODES: dict[str, dict[str, Any]] = {
    "zero0": engine.config(0),
    "zero1": engine.config(1),
    "zero1-offload": engine.config(1, offload=True),
    "zero2": engine.config(2),
    "zero2-round-robin": engine.config(2, round_robin_gradients=True),
    "zero2-not-contiguous": engine.config(2, contiguous_gradients=False),
    "zero2-no-reduce-scatter": engine.config(2, reduce_scatter=False),
    "zero2-offload": engine.config(2, offload=True),
    "zero2-accumulate": engine.config(2, accumulate=2),
    "zero3": engine.config(3),
    "zero3-sub-groups": engine.config(3, sub_group_size=200),
    "zero3-offload": engine.config(3, offload=True, sub_group_size=200),
    "zero3-accumulate": engine.config(3, accumulate=2, sub_group_size=200),
    "zero0-bf16": engine.config(0, "bf16"),
    "zero0-fp16": engine.config(0, "fp16"),
    "zero1-bf16": engine.config(1, "bf16"),
    "zero1-bf16-fp32-accumulation": {**engine.config(1, "bf16"), "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2-bf16-fp32-accumulation": {**engine.config(2, "bf16"), "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2-bf16": engine.config(2, "bf16"),
    "zero2-bf16-offload": engine.config(2, "bf16", offload=True),
    "zero2-bf16-accumulate": engine.config(2, "bf16", accumulate=2),
    "zero3-bf16": engine.config(3, "bf16", sub_group_size=200),
    "zero3-bf16-offload": engine.config(3, "bf16", offload=True),
    "zero1-fp16": engine.config(1, "fp16"),
    "zero2-fp16": engine.config(2, "fp16"),
    "zero2-fp16-offload": engine.config(2, "fp16", offload=True),
    "zero3-fp16": engine.config(3, "fp16", sub_group_size=200),
}
FAST = {"zero0", "zero2", "zero3-sub-groups", "zero2-bf16"}
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "delayed": {"sync": "delayed"},
    "layer": {"scope": "layer", "gamma": 0.2},
    "threshold": {"threshold": 0.1, "alpha_warmup": 5},
    "ahead": {"lookahead": 0.25},
}


def dtype_of(mode: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in mode else torch.float16 if "fp16" in mode else torch.float32


def assert_equal(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Counts, alphas and parameters of every rank are one process's, bit for bit."""
    for rank, result in enumerate(ranks):
        assert result["seen"] == alone["seen"], f"alpha or counts differ on rank {rank}"
        for name, expected in alone["params"].items():
            assert torch.equal(result["params"][name], expected), f"{name} differs on rank {rank}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in MODES])
def test_two_ranks_equal_one_process(ranks2: Ranks, mode: str, options: dict[str, Any]) -> None:
    ranks = ranks2.run(engine.given, MODES[mode], options)
    # DeepSpeed 0.19.8 at stage 0 divides fp16 gradients by the loss scale without having multiplied the loss by it
    shrink = 2.0**-8 if mode == "zero0-fp16" else 1.0
    assert_equal(ranks, engine.given_alone(options, dtype=dtype_of(mode), shrink=shrink))
    alphas = [alpha for alpha, _ in ranks[0]["seen"]]
    assert alphas[0] != alphas[-1], "alpha never moved: the test would show nothing"


@pytest.mark.parametrize("sync", ["exact", "delayed"])
@pytest.mark.parametrize("mode", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in MODES])
def test_looking_ahead_without_masks(ranks2: Ranks, mode: str, sync: str) -> None:
    """With gamma 1 nothing is counted, and T counts the steps."""
    options = {"lookahead": 0.5, "gamma": 1.0, "sync": sync}
    ranks = ranks2.run(engine.given, MODES[mode], options)
    shrink = 2.0**-8 if mode == "zero0-fp16" else 1.0
    assert_equal(ranks, engine.given_alone(options, dtype=dtype_of(mode), shrink=shrink))
    assert all(seen == (1.0, ranks[0]["seen"][0][1]) for seen in ranks[0]["seen"])


@pytest.mark.parametrize("mode", ["zero1", "zero2-offload", "zero2-bf16", "zero3-sub-groups"])
@pytest.mark.parametrize(
    "options", [OPTIONS["delayed"], OPTIONS["threshold"], OPTIONS["ahead"]], ids=["delayed", "threshold", "ahead"]
)
def test_on_the_fast_kernels(ranks2: Ranks, mode: str, options: dict[str, Any]) -> None:
    options = {**options, "fused": True}
    assert_equal(ranks2.run(engine.given, MODES[mode], options), engine.given_alone(options, dtype=dtype_of(mode)))


@pytest.mark.parametrize("mode", ["zero0", "zero2", "zero3-sub-groups", "zero2-bf16"])
@pytest.mark.parametrize(
    "options", [OPTIONS["exact"], OPTIONS["layer"], OPTIONS["ahead"]], ids=["exact", "layer", "ahead"]
)
def test_named_in_the_json(ranks2: Ranks, mode: str, options: dict[str, Any]) -> None:
    ranks = ranks2.run(engine.given, MODES[mode], options, client=False)
    assert_equal(ranks, engine.given_alone(options, client=False, dtype=dtype_of(mode)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero1", "zero2-offload", "zero3-sub-groups", "zero2-bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_four_ranks_equal_one_process(ranks4: Ranks, mode: str, options: dict[str, Any]) -> None:
    assert_equal(ranks4.run(engine.given, MODES[mode], options), engine.given_alone(options, dtype=dtype_of(mode)))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "setting"), nightly_but(product(["zero2", "zero3-sub-groups"], OPTIONS), every=3))
def test_three_ranks_agree_with_one_process(ranks3: Ranks, mode: str, setting: str) -> None:
    """A third of a float sums to one only up to rounding, so gradients differ in the last bit; signs don't."""
    options = OPTIONS[setting]
    alone = engine.given_alone(options)
    for result in ranks3.run(engine.given, MODES[mode], options):
        assert result["seen"] == alone["seen"]
        for name, expected in alone["params"].items():
            torch.testing.assert_close(result["params"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero0", "zero1", "zero2", "zero2-offload", "zero3-sub-groups", "zero3-offload"])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.1}], ids=["signs", "threshold"])
def test_gradient_clipping(ranks2: Ranks, mode: str, options: dict[str, Any]) -> None:
    """The norm's summation order differs between shardings, so parameters may differ in the last bits."""
    clip = 1.0  # the gradients' norm is about 30
    alone = engine.given_alone(options, clip=clip)
    for result in ranks2.run(engine.given, {**MODES[mode], "gradient_clipping": clip}, options):
        assert result["seen"] == alone["seen"]
        for name, expected in alone["params"].items():
            torch.testing.assert_close(result["params"][name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero1", "zero2", "zero2-offload", "zero3-sub-groups", "zero2-accumulate"])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 16),
        ({"sync": "delayed"}, 16),
        ({"scope": "layer"}, 5 * 16),
        ({"telemetry": True}, 32),
        ({"sync": "delayed", "telemetry": True}, 32),
        ({"gamma": 1.0, "telemetry": True}, 16),
    ],
    ids=["exact", "delayed", "layer", "telemetry", "telemetry-delayed", "telemetry-without-masks"],
)
def test_one_all_reduce_a_step(ranks2: Ranks, mode: str, options: dict[str, Any], size: int) -> None:
    """All that engine.step() communicates is AdamW's, and one all-reduce at a boundary: counted on the wire."""
    ours = ranks2.run(engine.given, MODES[mode], options, steps=4, count_collectives=True)
    theirs = ranks2.run(engine.given, MODES[mode], {}, steps=4, count_collectives=True, optimizer="AdamW")
    accumulate = MODES[mode]["gradient_accumulation_steps"]
    for result, adamw in zip(ours, theirs, strict=True):
        for i, (sizes, base) in enumerate(zip(result["collectives"], adamw["collectives"], strict=True)):
            extra = list(sizes)
            for collective in base:
                extra.remove(collective)
            boundary = (i + 1) % accumulate == 0
            assert extra == ([("all_reduce", size)] if boundary else [])


def test_stage_zero_reduces_nothing(ranks2: Ranks) -> None:
    for result in ranks2.run(engine.given, MODES["zero0"], {}, steps=3, count_collectives=True):
        adamw = ranks2.run(engine.given, MODES["zero0"], {}, steps=3, count_collectives=True, optimizer="AdamW")[0]
        assert result["collectives"] == adamw["collectives"]
