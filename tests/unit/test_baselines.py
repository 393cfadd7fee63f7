"""Each peer and control against its formula, in plain Python floats, a coordinate at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam
from benchmarks import baselines

from .problems import gradients, parameters_of, step_with, tensors

SHAPES = ((7, 5), (13,), (2, 3, 4))
STEPS = 6
LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.8, 0.95, 1e-6, 0.1
ADAMW: dict[str, Any] = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}

Factors = Callable[[list[float], list[float]], list[float]]


def cautious(u: list[float], g: list[float]) -> list[float]:
    kept = sum(a * b > 0 for a, b in zip(u, g, strict=True))
    return [len(u) / max(kept, 1e-3 * len(u)) if a * b > 0 else 0.0 for a, b in zip(u, g, strict=True)]


def largest_half(u: list[float], g: list[float]) -> list[float]:
    ranked = sorted(range(len(u)), key=lambda i: u[i] * g[i], reverse=True)
    chosen = set(ranked[: math.floor(0.5 * len(u))])
    return [2.0 if i in chosen else 0.1 for i in range(len(u))]


def not_opposed(u: list[float], g: list[float]) -> list[float]:
    return [2.0 if a * b >= 0 else 0.1 for a, b in zip(u, g, strict=True)]


def run(optimizer: torch.optim.Optimizer, grads: list[list[Any]]) -> list[list[float]]:
    for grad in grads:
        step_with(optimizer, grad)
    return [p.detach().flatten().tolist() for p in parameters_of(optimizer)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in tensors(0, torch.float64, SHAPES)]


def adamw_with(factors: Factors, grads: list[list[Any]]) -> list[list[float]]:
    result = []
    for i, start in enumerate(tensors(0, torch.float64, SHAPES)):
        p = start.flatten().tolist()
        m, v = [0.0] * len(p), [0.0] * len(p)
        for t, grad in enumerate(grads, start=1):
            g = grad[i].flatten().tolist()
            m = [BETA1 * a + (1 - BETA1) * b for a, b in zip(m, g, strict=True)]
            v = [BETA2 * a + (1 - BETA2) * b * b for a, b in zip(v, g, strict=True)]
            c1, c2 = 1 - BETA1**t, 1 - BETA2**t
            u = [a / c1 / (math.sqrt(b / c2) + EPS) for a, b in zip(m, v, strict=True)]
            f = factors(u, g)
            p = [x * (1 - LR * DECAY) - LR * a * b for x, a, b in zip(p, u, f, strict=True)]
        result.append(p)
    return result


@pytest.mark.parametrize(
    ("peer", "factors"),
    [
        (baselines.CAdamW, cautious),
        (baselines.MGUPAdamW, largest_half),
        (baselines.CMGUPAdamW, not_opposed),
    ],
)
def test_peers_follow_their_rule(peer: Callable[..., torch.optim.Optimizer], factors: Factors) -> None:
    grads = gradients(STEPS, torch.float64, SHAPES)
    expected = adamw_with(factors, grads)
    for got, want in zip(run(peer(parameters(), **ADAMW), grads), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-12)


def ahead_with(
    numerator: Callable[[float, float, int], float], cautious_decay: bool, grads: list[list[Any]]
) -> list[list[float]]:
    result = []
    for i, start in enumerate(tensors(0, torch.float64, SHAPES)):
        p = start.flatten().tolist()
        m, v = [0.0] * len(p), [0.0] * len(p)
        for t, grad in enumerate(grads, start=1):
            for j, g in enumerate(grad[i].flatten().tolist()):
                m[j] = BETA1 * m[j] + (1 - BETA1) * g
                v[j] = BETA2 * v[j] + (1 - BETA2) * g * g
                u = numerator(m[j], g, t) / (math.sqrt(v[j] / (1 - BETA2**t)) + EPS)
                decays = u * p[j] >= 0 or not cautious_decay
                p[j] -= LR * DECAY * p[j] * decays + LR * u
        result.append(p)
    return result


def nesterov(m: float, g: float, t: int) -> float:
    return BETA1 * m / (1 - BETA1 ** (t + 1)) + (1 - BETA1) * g / (1 - BETA1**t)


def look_ahead(m: float, g: float, t: int) -> float:
    return (m / (1 - BETA1**t) + 0.5 * g) / 1.5


@pytest.mark.parametrize(
    ("peer", "options", "numerator"),
    [
        (baselines.NAdamW, {}, nesterov),
        (baselines.LookAhead, {"lookahead": 0.5}, look_ahead),
        (baselines.LookAhead, {"lookahead": 0.5, "cautious_decay": True}, look_ahead),
    ],
)
def test_optimizers_that_look_ahead_follow_their_rule(
    peer: Callable[..., torch.optim.Optimizer], options: dict[str, Any], numerator: Callable[[float, float, int], float]
) -> None:
    grads = gradients(STEPS, torch.float64, SHAPES)
    expected = ahead_with(numerator, bool(options.get("cautious_decay")), grads)
    for got, want in zip(run(peer(parameters(), **ADAMW, **options), grads), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-12)


def test_the_controls_look_ahead_is_alphaadams() -> None:
    grads = gradients(STEPS, torch.float64, SHAPES)
    theirs = run(AlphaAdam(parameters(), lookahead=0.5, gamma=1.0, **ADAMW), grads)
    for got, want in zip(run(baselines.LookAhead(parameters(), lookahead=0.5, **ADAMW), grads), theirs, strict=True):
        assert got == pytest.approx(want, rel=1e-12)


def test_cmgup_of_the_evidence_steps_by_one_where_there_is_no_gradient() -> None:
    ends = []
    for evidence in (True, False):
        optimizer = baselines.CMGUPAdamW([nn.Parameter(torch.zeros(3, dtype=torch.float64))], lr=1.0, evidence=evidence)
        step_with(optimizer, [torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)])
        before = parameters_of(optimizer)[0].detach().clone()
        step_with(optimizer, [torch.tensor([1.0, 0.0, 1e3], dtype=torch.float64)])
        ends.append((parameters_of(optimizer)[0].detach() - before * (1 - 1e-2)).tolist())
    (same, quiet, opposed), (same_too, as_released, opposed_too) = ends
    assert (same, opposed) == pytest.approx((same_too, opposed_too))
    assert as_released == pytest.approx(2 * quiet)


def test_cautious_adamw_multiplies_by_no_more_than_a_thousand() -> None:
    start = torch.zeros(5000, dtype=torch.float64)
    optimizer = baselines.CAdamW([nn.Parameter(start.clone())], lr=1.0, weight_decay=0.0)
    grad = torch.zeros(5000, dtype=torch.float64)
    grad[3] = 2.0
    step_with(optimizer, [grad])  # one of 5000 is kept: n / kept would be 5000
    assert parameters_of(optimizer)[0][3].item() == pytest.approx(-1000.0, rel=1e-7)


def test_lion_follows_its_rule() -> None:
    grads = gradients(STEPS, torch.float64, SHAPES)
    result = run(baselines.Lion(parameters(), lr=LR, betas=(BETA1, BETA2), weight_decay=DECAY), grads)
    for i, start in enumerate(tensors(0, torch.float64, SHAPES)):
        p = start.flatten().tolist()
        m = [0.0] * len(p)
        for grad in grads:
            for j, g in enumerate(grad[i].flatten().tolist()):
                direction = BETA1 * m[j] + (1 - BETA1) * g
                p[j] = p[j] * (1 - LR * DECAY) - LR * ((direction > 0) - (direction < 0))
                m[j] = BETA2 * m[j] + (1 - BETA2) * g
        assert result[i] == pytest.approx(p, rel=1e-12)


def test_constant_alpha_is_alphaadam_when_its_alpha_stands_at_that_constant() -> None:
    grads = gradients(STEPS, torch.float64, SHAPES)
    capped = AlphaAdam(parameters(), alpha_max=1.25, **ADAMW)
    expected, alphas = parameters(), []
    optimizer = baselines.ConstantAlpha(expected, alpha=1.25, **ADAMW)
    step_with(optimizer, grads[0])
    step_with(capped, grads[0])
    for mine, theirs in zip(parameters_of(optimizer), parameters_of(capped), strict=True):
        assert not torch.equal(mine, theirs)  # nothing conflicts on the first step, so the constant shows
        mine.data.copy_(theirs)
    for grad in grads[1:]:
        step_with(optimizer, grad)
        step_with(capped, grad)
        alphas.append(capped.alpha)
    assert alphas == [1.25] * (STEPS - 1)
    for mine, theirs in zip(parameters_of(optimizer), parameters_of(capped), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_random_mask_holds_back_as_many_but_others_and_keeps_the_mean_step() -> None:
    size = 20_000
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(size, dtype=torch.float64, generator=generator)
    # every seventh turns round, every fifth has no gradient
    second = torch.where(torch.arange(size) % 7 == 0, -first, first)
    second[::5] = 0.0
    conflicts = (torch.arange(size) % 7 == 0) & (second != 0)

    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(size, dtype=torch.float64))], foreach=False)
    random = baselines.RandomMask([nn.Parameter(torch.zeros(size, dtype=torch.float64))])
    steps = []
    for optimizer in (adam, random):
        param = parameters_of(optimizer)[0]
        step_with(optimizer, [first])
        before = param.detach() * (1 - 1e-3 * 1e-2)
        step_with(optimizer, [second])
        steps.append(param.detach() - before)
    f = steps[1] / steps[0]
    evidence = second != 0
    held_back = f.abs() < 1e-12
    torch.testing.assert_close(f[~evidence], torch.ones(size // 5, dtype=torch.float64))
    assert held_back.sum().item() == pytest.approx(conflicts.sum().item(), rel=0.08)  # 4 standard deviations
    assert (held_back & conflicts).sum() < conflicts.sum() // 3
    assert f[evidence].mean().item() == pytest.approx(1.0, rel=1e-9)


def test_rounds_to_nearest_is_alphaadam_whose_bf16_numbers_are_the_nearest() -> None:
    grads = [[grad.float() for grad in step] for step in gradients(1, torch.float64, SHAPES)]
    options = {**ADAMW, "state_dtype": "bfloat16"}
    starts = [start.float() for start in tensors(0, torch.float64, SHAPES)]
    nearest = baselines.RoundsToNearest([nn.Parameter(start.clone()) for start in starts], **options)
    chance = AlphaAdam([nn.Parameter(start.clone()) for start in starts], **options)
    exact = AlphaAdam([nn.Parameter(start.clone()) for start in starts], **ADAMW)
    for optimizer in (nearest, chance, exact):
        step_with(optimizer, grads[0])
    differs = False
    for mine, theirs, twin in zip(*map(parameters_of, (nearest, chance, exact)), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(nearest.state[mine][moment], exact.state[twin][moment].bfloat16())
            differs |= not torch.equal(chance.state[theirs][moment], nearest.state[mine][moment])
    assert differs
