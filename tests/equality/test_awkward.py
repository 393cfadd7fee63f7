"""Gradients that come and go, groups that are added, tensors and meshes that torch itself does not mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from tests.models import Given, given_gradients

from .. import threads
from ..marks import slow_but
from . import given, pieces

DTENSORS = ("plain", "fsdp2", "hsdp", "tp", "tp2-fsdp2", "hsdp-tp", "pipeline", "by-hand")
BACKWARD = ("fsdp1-original", "fsdp1-flat")
CLIPPED = (*DTENSORS[1:], *BACKWARD, "ddp", "fsdp1-flat-hybrid")
OPTIONS: dict[str, dict[str, Any]] = {"exact": {}, "delayed": {"sync": "delayed"}, "layer": {"scope": "layer"}}


def of_ranks(regime: str, function: Any, *args: Any) -> tuple[list[Any], list[Any]]:
    """What a function returns on the ranks of a regime, and in one process."""
    return threads.run(given.REGIMES[regime][0], function, regime, *args), threads.run(1, function, "plain", *args)


def assert_equal(ranks: list[Any], alone: list[Any], **close: float) -> None:
    for rank in ranks:
        for (alpha, counts), (alpha_alone, counts_alone) in zip(rank["seen"], alone[0]["seen"], strict=True):
            assert counts == counts_alone
            assert alpha == ({k: alpha_alone[k] for k in alpha} if isinstance(alpha, dict) else alpha_alone)
    whole = [pieces.assemble([rank["params"] for rank in held], given.SHAPES) for held in (ranks, alone)]
    for name in given.SHAPES:
        torch.testing.assert_close(whole[0][name], whole[1][name], **(close or {"rtol": 0, "atol": 0}))


def built(regime: str, options: dict[str, Any], named: Any = None) -> tuple[nn.Module, AlphaAdam]:
    _, shard, extra = given.REGIMES[regime]
    model = shard(Given())
    params = [(n, p) for n, p in model.named_parameters() if named is None or named(n)]
    return model, AlphaAdam(params, **{"lr": given.LR, "weight_decay": 0.1, **options, **extra()})


def sometimes_unused(regime: str, options: dict[str, Any]) -> dict[str, Any]:
    """Every parameter misses some steps, 'one' the first, and in one step nothing has a gradient."""
    model, optimizer = built(regime, options)
    seen = []
    for step, gradients in enumerate(given_gradients(8)):
        for i, name in enumerate(sorted(gradients)):
            if (step + i) % 3 == 0 or step == 4:
                gradients[name] = None
        given.give(model, gradients)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(given.observe(optimizer))
    return {"seen": seen, "params": pieces.of_model(model, given.SHAPES)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("regime", slow_but(DTENSORS[1:], "fsdp2"))
def test_parameters_unused_in_some_steps(regime: str, options: dict[str, Any]) -> None:
    """Not under FSDP1, which gives an unused parameter zeros, which decay its moments."""
    assert_equal(*of_ranks(regime, sometimes_unused, options))


def none_where_empty(regime: str, options: dict[str, Any]) -> dict[str, Any]:
    """A rank that holds nothing of a parameter has no gradient of it either, and one has it in even steps only."""
    model, optimizer = built(regime, options)
    seen = []
    for step, gradients in enumerate(given_gradients(8)):
        given.give(model, gradients)
        for param in model.parameters():
            if param.grad is not None and pieces.local(param).numel() == 0 and (step + pieces.rank_in_world()) % 2:
                param.grad = None
        optimizer.step()
        seen.append(given.observe(optimizer))
    return {"seen": seen, "params": pieces.of_model(model, given.SHAPES)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("regime", slow_but(["fsdp2", "tp2-fsdp2", "by-hand"], "fsdp2"))
def test_gradient_none_on_some_ranks(regime: str, options: dict[str, Any]) -> None:
    assert_equal(*of_ranks(regime, none_where_empty, options))


def group_added(regime: str, options: dict[str, Any]) -> dict[str, Any]:
    """The embedding joins after three steps with another learning rate, and a frozen parameter thaws."""
    late = ("embedding",)
    model, optimizer = built(regime, options, lambda name: name not in late)
    seen = []
    for step, gradients in enumerate(given_gradients(8)):
        if step == 3:
            named = [(n, p) for n, p in model.named_parameters() if n in late]
            if named:
                optimizer.add_param_group({"params": named, "lr": 3e-2})
        given.give(model, gradients)
        optimizer.step()
        seen.append(given.observe(optimizer))
    return {"seen": seen, "params": pieces.of_model(model, given.SHAPES)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("regime", slow_but(["fsdp2", "hsdp", "tp2-fsdp2", "by-hand"], "fsdp2"))
def test_a_group_added_in_mid_run(regime: str, options: dict[str, Any]) -> None:
    assert_equal(*of_ranks(regime, group_added, options))


# ---- clip_norm

CLIP = 1.0  # the gradients' norm is about 30


def clipped(regime: str, options: dict[str, Any]) -> dict[str, Any]:
    model, optimizer = built(regime, {"clip_norm": CLIP, **options})
    seen, coefficients, collectives = [], [], []
    for gradients in given_gradients(6):
        given.give(model, gradients)
        before = {p: pieces.local(p.grad).clone() for p in model.parameters() if p.grad is not None}
        with threads.Collectives() as counted:
            optimizer.step()
        for param, grad in before.items():
            assert torch.equal(pieces.local(param.grad), grad), "the gradient is the caller's"
        optimizer.zero_grad()
        coefficients.append(float(optimizer._adopt().clip_coefficient()))
        collectives.append(counted.seen)
        seen.append(given.observe(optimizer))
    params = pieces.of_model(model, given.SHAPES)
    return {"seen": seen, "coefficients": coefficients, "collectives": collectives, "params": params}


@pytest.mark.parametrize("options", [{}, {"threshold": 0.1}, {"scope": "layer"}], ids=["exact", "threshold", "layer"])
@pytest.mark.parametrize("regime", slow_but(CLIPPED, "ddp"))
def test_clip_norm_is_one_processs_on_any_mixture(regime: str, options: dict[str, Any]) -> None:
    """Norms are summed in another order, so the last bit of a parameter may differ."""
    ranks, alone = of_ranks(regime, clipped, options)
    assert_equal(ranks, alone, rtol=1e-6, atol=1e-7)
    norms = [
        float(torch.stack([g.double().square().sum() for g in step.values()]).sum().sqrt())
        for step in given_gradients(6)
    ]
    for rank in ranks:
        assert rank["coefficients"] == ranks[0]["coefficients"], "the same bits on all ranks"
        assert rank["coefficients"] == pytest.approx([CLIP / (norm + 1e-6) for norm in norms], rel=1e-12)
        reduces = 0 if regime == "ddp" else 1 + ("threshold" in options)  # a threshold needs the norm before it counts
        assert rank["collectives"][1:] == [["AllReduce"] * reduces] * 5


def clipped_by_torch(regime: str, ours: bool) -> tuple[dict[str, Tensor], float]:
    model, optimizer = built(regime, {"clip_norm": CLIP} if ours else {})
    for gradients in given_gradients(6):
        given.give(model, gradients)
        if not ours:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return pieces.of_model(model, given.SHAPES), optimizer.metrics()["alpha"]


@pytest.mark.parametrize("regime", slow_but(["plain", "fsdp2", "hsdp"], "fsdp2"))
def test_clip_norm_is_torchs_where_that_works(regime: str) -> None:
    world = given.REGIMES[regime][0]
    ours, theirs = (threads.run(world, clipped_by_torch, regime, own) for own in (True, False))
    assert ours[0][1] == theirs[0][1]
    whole = [pieces.assemble([params for params, _ in ranks], given.SHAPES) for ranks in (ours, theirs)]
    for name in given.SHAPES:
        torch.testing.assert_close(whole[0][name], whole[1][name], rtol=1e-6, atol=1e-7)


def test_torch_cannot_clip_what_clip_norm_can() -> None:
    """If this fails torch has learned it, and clip_norm is no longer the only way."""
    with pytest.raises(Exception, match=r"mixed torch.Tensor and DTensor|cross-mesh|different mesh"):
        threads.run(4, clipped_by_torch, "tp", False)
