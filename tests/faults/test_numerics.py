"""Numbers that no training should meet: what AdamW survives, AlphaAdam survives, and all ranks agree on alpha.

The moments do not depend on alpha, so with given gradients they must have AdamW's bits whatever the gradients are; and
a parameter is finite wherever AdamW's is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from tests.models import Given, given_gradients
from tests.ranks import Ranks
from tests.zero import engine

from .. import threads
from ..equality import given, pieces
from ..marks import slow_but

STEPS = 6
Gradients = list[dict[str, Tensor]]


def nan_on_one_rank(steps: Gradients) -> None:
    """Elements of a matrix that lie in one rank's shard."""
    steps[2]["weight"].view(-1)[3] = math.nan
    steps[4]["weight"].view(-1)[5] = math.nan


def inf_on_one_rank(steps: Gradients) -> None:
    steps[2]["weight"].view(-1)[3] = math.inf
    steps[3]["weight"].view(-1)[3] = -math.inf


def zeros(steps: Gradients) -> None:
    for at in (0, 3, 4):
        for grad in steps[at].values():
            grad.zero_()


def denormals(steps: Gradients) -> None:
    for step in steps[2:]:
        for grad in step.values():
            grad.mul_(1e-40)


def giants(steps: Gradients) -> None:
    """Their squares overflow. Beyond 8e37 f * m overflows too, where AdamW's m does not: the last factor 4 of fp32."""
    for step in steps[2:]:
        for grad in step.values():
            grad.mul_(1e37)


def conflict_everywhere(steps: Gradients) -> None:
    """All but one coordinate turn around: A = 1, so C / A is as large as the model."""
    for before, step in pairwise(steps):
        for name, grad in step.items():
            grad.copy_(-10 * before[name])
        step["one"].neg_()


def as_they_are(steps: Gradients) -> None:
    pass


POISONS: list[Callable[[Gradients], None]] = [
    nan_on_one_rank, inf_on_one_rank, zeros, denormals, giants, conflict_everywhere, as_they_are,
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "no-cap": {"alpha_max": math.inf, "threshold": 0.1},
    "delayed": {"sync": "delayed", "alpha_warmup": 3},
    "layer": {"scope": "layer", "alpha_max": math.inf},
    "clipped": {"clip_norm": 1.0},
    "lr-0": {"lr": 0.0},
}


def run(regime: str, options: dict[str, Any], poison: Callable[[Gradients], None]) -> dict[str, Any]:
    """On a rank: steps with poisoned gradients; alphas, counts, and the rank's parameters and moments after each."""
    _, shard, extra = given.REGIMES[regime]
    model = shard(Given())
    optimizer = AlphaAdam(model.named_parameters(), **{"lr": given.LR, **options, **extra()})
    steps = given_gradients(STEPS)
    poison(steps)
    seen, held = [], []
    for gradients in steps:
        given.give(model, gradients)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(given.observe(optimizer))
        held.append({"param": pieces.of_model(model, given.SHAPES), **moments(model, optimizer)})
    return {"seen": seen, "held": held}


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, pieces.Pieces]:
    named = [(n.removeprefix("module."), p) for n, p in model.named_parameters() if optimizer.state.get(p)]
    return {
        key: pieces.pieces(named, given.SHAPES, {p: optimizer.state[p][key] for _, p in named})
        for key in ("exp_avg", "exp_avg_sq")
    }


def adamw(
    poison: Callable[[Gradients], None], lr: float, clip_norm: float | None
) -> list[dict[str, dict[str, Tensor]]]:
    """AdamW's parameters and moments after each step, in one process."""
    model = Given()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)
    steps = given_gradients(STEPS)
    poison(steps)
    result = []
    for gradients in steps:
        given.give(model, gradients)
        if clip_norm is not None:
            norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
            for param in model.parameters():
                if param.grad is not None:
                    param.grad.mul_((clip_norm / (norm + 1e-6)).clamp(max=1.0).float())
        optimizer.step()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        result.append({"param": {n: p.detach().clone() for n, p in named}})
        for key in ("exp_avg", "exp_avg_sq"):
            result[-1][key] = {n: optimizer.state[p][key].clone() for n, p in named}
    return result


@pytest.mark.parametrize("setting", OPTIONS)
@pytest.mark.parametrize("poison", slow_but(POISONS, nan_on_one_rank), ids=lambda p: p.__name__)
def test_never_worse_than_adamw_and_all_ranks_agree(poison: Callable[[Gradients], None], setting: str) -> None:
    options = OPTIONS[setting]
    lr = options.get("lr", given.LR)
    expected = adamw(poison, lr, options.get("clip_norm"))
    (alone,) = threads.run(1, run, "plain", options, poison)
    for ranks in (threads.run(4, run, regime, options, poison) for regime in ("fsdp2", "ddp")):
        for rank in ranks:
            assert rank["seen"] == alone["seen"]
        for step, theirs in enumerate(expected):
            alpha, counts = ranks[0]["seen"][step]
            assert all(math.isfinite(a) and a >= 1 for a in (alpha.values() if isinstance(alpha, dict) else [alpha]))
            assert counts["agree"] >= 0
            for key, tensors in theirs.items():
                ours = assemble([rank["held"][step][key] for rank in ranks], tensors)
                for name, tensor in tensors.items():
                    if key == "param":
                        assert ours[name].isfinite()[tensor.isfinite()].all(), f"{name} is worse than AdamW's"
                        assert tensor.isfinite()[ours[name].isfinite()].all(), f"{name} hides what AdamW shows"
                        assert lr or torch.equal(ours[name].nan_to_num(), tensor.nan_to_num())
                    else:
                        # torch rounds the last bit of denormals by their place in a tensor, and shards move it
                        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=3e-45, equal_nan=True)


def assemble(ranks: list[pieces.Pieces], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, NaN where they are NaN; replicas must be equal, NaN or not."""
    whole = {name: torch.empty_like(tensor).view(-1) for name, tensor in like.items()}
    for held in ranks:
        for name, tensor in whole.items():
            tensor[held[name][0]] = held[name][1]
    for held in ranks:
        for name, tensor in whole.items():
            torch.testing.assert_close(tensor[held[name][0]], held[name][1], rtol=0, atol=0, equal_nan=True)
    return {name: tensor.view(like[name].shape) for name, tensor in whole.items()}


SKIPPING: dict[str, dict[str, Any]] = {
    "global": {},
    "layer, clipped": {"scope": "layer", "clip_norm": 1e6, "fused": True},
    "threshold, clipped": {"threshold": 0.1, "clip_norm": 1e6},
    "no masks": {"gamma": 1.0, "lookahead": 0.25, "fused": True},
}
"""With skip_nonfinite. The clipping cuts nothing: a norm is summed in another order under each sharding."""


@pytest.mark.parametrize("setting", SKIPPING)
@pytest.mark.parametrize("poison", [nan_on_one_rank, inf_on_one_rank], ids=lambda p: p.__name__)
def test_a_step_that_is_not_finite_is_left_out_on_all_ranks_alike(
    poison: Callable[[Gradients], None], setting: str
) -> None:
    """The poison lies in one rank's shard. What is held after such a step is, to the bit, what was held before it."""
    options = {**SKIPPING[setting], "skip_nonfinite": True}
    (alone,) = threads.run(1, run, "plain", options, poison)
    shapes = {name: torch.empty(shape) for name, shape in given.SHAPES.items() if name != "frozen"}
    wholes = []
    for ranks in ([alone], *(threads.run(4, run, regime, options, poison) for regime in ("fsdp2", "hsdp", "ddp"))):
        assert all(rank["seen"] == alone["seen"] for rank in ranks)
        wholes.append([
            {key: assemble([rank["held"][step][key] for rank in ranks], shapes) for key in ranks[0]["held"][step]}
            for step in range(STEPS)
        ])  # fmt: skip
    left_out = [poisoned(poison, step) for step in range(STEPS)]
    assert sum(left_out) == 2
    for step in range(1, STEPS):
        same = all(
            torch.equal(now, wholes[0][step - 1][key][name])
            for key, tensors in wholes[0][step].items()
            for name, now in tensors.items()
        )
        assert same == left_out[step]
    for whole in wholes[1:]:
        for step in range(STEPS):
            for key, tensors in whole[step].items():
                assert all(torch.equal(one, wholes[0][step][key][name]) for name, one in tensors.items())


def poisoned(poison: Callable[[Gradients], None], step: int) -> bool:
    steps = given_gradients(STEPS)
    poison(steps)
    return not all(bool(grad.isfinite().all()) for grad in steps[step].values())


def test_conflict_everywhere_meets_the_cap_and_without_it_a_large_finite_alpha() -> None:
    """Else the test above would not have met it."""
    (capped,) = threads.run(1, run, "plain", {}, conflict_everywhere)
    assert capped["seen"][1][0] == 4.0
    (free,) = threads.run(1, run, "plain", {"alpha_max": math.inf}, conflict_everywhere)
    assert 100 < free["seen"][1][0] < 1000
    assert free["seen"][1][1]["agree"] == 1


# ---- parameters that appear and disappear


def merge_adapter(world_regime: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train a part of the model as an adapter is; then take it out, and go on with the rest, which had been frozen."""
    _, shard, extra = given.REGIMES[world_regime]
    model = shard(Given())
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adapter, rest = ("norm", "bias", "one"), ("embedding", "weight")
    optimizer = AlphaAdam([(n, named[n]) for n in adapter], lr=given.LR, **options, **extra())
    seen = []
    for step, gradients in enumerate(given_gradients(9)):
        if step == 3:  # a group appears
            optimizer.add_param_group({"params": [("weight", named["weight"])], "lr": 3e-3})
        if step == 6:  # the adapter disappears, and what it was merged into appears
            group = optimizer.param_groups[0]
            for param in group["params"]:
                optimizer.state.pop(param)
            group["params"], group["param_names"] = [named["embedding"]], ["embedding"]
        trained = rest if step >= 6 else (*adapter, "weight")[: 3 + (step >= 3)]
        for name, param in named.items():
            param.grad = pieces.local_part(gradients[name], param) if name in trained else None
        optimizer.step()
        seen.append(given.observe(optimizer))
    return {"seen": seen, "params": pieces.of_model(model, given.SHAPES)}


@pytest.mark.parametrize("regime", slow_but(["fsdp2", "hsdp", "by-hand", "tp"], "fsdp2"))
@pytest.mark.parametrize("setting", ["exact", "delayed", "layer"])
def test_parameters_that_appear_and_disappear_count_as_in_one_process(regime: str, setting: str) -> None:
    (alone,) = threads.run(1, merge_adapter, "plain", OPTIONS[setting])
    ranks = threads.run(4, merge_adapter, regime, OPTIONS[setting])
    for rank in ranks:
        for (alpha, counts), (alpha_alone, counts_alone) in zip(rank["seen"], alone["seen"], strict=True):
            assert alpha == alpha_alone
            assert counts == counts_alone
    sizes = [counts["agree"] + counts["conflict"] for _, counts in alone["seen"]]
    assert max(sizes[:3]) < 20 < min(sizes[3:6]) <= max(sizes[3:6]) < 160 < min(sizes[6:])
    whole = pieces.assemble([rank["params"] for rank in ranks], given.SHAPES)
    for name, expected in pieces.assemble([alone["params"]], given.SHAPES).items():
        assert torch.equal(whole[name], expected), name


# ---- under ZeRO


def run_zero(stage: int, poison: str, optimizer: str) -> dict[str, Any]:
    started = engine.start(Given(), engine.config(stage), {}, client=True, optimizer=optimizer)
    steps = given_gradients(STEPS)
    globals()[poison](steps)
    seen, finite = [], []
    for gradients in steps:
        started.backward(started(gradients))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
        finite.append({name: param.isfinite() for name, param in engine.masters(started).items()})
    started.destroy()
    return {"seen": seen, "finite": finite, "rank": dist.get_rank()}


@pytest.mark.slow
@pytest.mark.parametrize("poison", slow_but(["nan_on_one_rank", "zeros", "denormals", "conflict_everywhere"]))
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_never_worse_than_adamw_and_all_ranks_agree(ranks2: Ranks, stage: int, poison: str) -> None:
    theirs = ranks2.run(run_zero, stage, poison, "AdamW")
    ours = ranks2.run(run_zero, stage, poison, "AlphaAdam")
    (alone,) = threads.run(1, run, "plain", {}, globals()[poison])
    for rank in ours:
        for step, (finite, expected) in enumerate(zip(rank["finite"], theirs[0]["finite"], strict=True)):
            assert all(torch.equal(finite[name], expected[name]) for name in expected), f"step {step}"
        assert all(math.isfinite(alpha) for alpha, _ in rank["seen"])
        assert rank["seen"] == ours[0]["seen"]
        if poison != "nan_on_one_rank":  # DeepSpeed skips a step with NaN
            for (alpha, counts), (alpha_alone, counts_alone) in zip(rank["seen"], alone["seen"], strict=True):
                assert alpha == alpha_alone
                assert all(counts[name] == counts_alone[name] for name in ("agree", "conflict"))
