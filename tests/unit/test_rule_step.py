"""A whole step of the rule: the five properties of the design, and the rule written anew, which must agree with it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphaadam_dist import rule

from ..faults.rule_in_numpy import MOMENTS, Array, Options, Rule
from .problems import SHAPES, gradients, same_bits, tensors

SAME: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def coordinates(params: Sequence[Tensor], **hyper: Any) -> list[rule.Coordinates]:
    return [
        rule.Coordinates(p.clone(), [torch.zeros_like(p), torch.zeros_like(p)], {**SAME, "step": 0.0, **hyper})
        for p in params
    ]


def adamw(params: Sequence[Tensor], **hyper: Any) -> tuple[list[Tensor], torch.optim.AdamW]:
    copies = [torch.nn.Parameter(p.clone()) for p in params]
    return [p.data for p in copies], torch.optim.AdamW(copies, **{**SAME, **hyper}, foreach=False, fused=False)


def step_adamw(optimizer: torch.optim.AdamW, grads: Sequence[Tensor | None]) -> None:
    for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


# ---- (1) the mean of f over the evidence is 1


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("threshold", [0.0, 1 / 9])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_mean_of_f_over_the_evidence_is_one(gamma: float, threshold: float, scope: str) -> None:
    """f is read off the movement: what each coordinate moved, over what AdamW with the same history moved it."""
    params = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    steps = gradients(6, torch.float64)
    # a bound on alpha that is not met, also where one of a parameter's few coordinates agrees
    hyper: dict[str, Any] = {"weight_decay": 0.0, "eps": 1e-12}
    model, memory = coordinates(params, **hyper), rule.Memory()
    for grads in steps[:-1]:
        rule.step_(model, grads, memory)
    for c in model:
        c.param.zero_()
    plain = [
        rule.Coordinates(torch.zeros_like(c.param), [m.clone() for m in c.moments], dict(c.hyperparameters))
        for c in model
    ]
    moments = [c.moments[0].clone() for c in model]
    options: dict[str, Any] = {"threshold": threshold, "scope": scope, "alpha_max": 1e3}
    rule.step_(model, steps[-1], memory, gamma=gamma, **options)
    rule.step_(plain, steps[-1], rule.Memory(), gamma=1.0)

    factors = []
    for c, p, grad, m in zip(model, plain, steps[-1], moments, strict=True):
        assert grad is not None
        f = c.param / p.param
        evidence = (grad != 0) & (p.param != 0)
        conflict = evidence & (m * grad < -threshold * grad * grad)
        # gamma * m over the same denominator, and one division: a few roundings of float64
        torch.testing.assert_close(f[conflict], torch.full_like(f[conflict], gamma), rtol=1e-14, atol=0)
        if scope == "layer" and (evidence & ~conflict).any():
            assert float(f[evidence].mean()) == pytest.approx(1, abs=1e-13)
        factors.append(f[evidence])
    total = torch.cat(factors)
    assert len(total) > 50
    assert total.std() > 0.3  # the masks do something
    if scope == "global":
        assert float(total.mean()) == pytest.approx(1, abs=1e-13)


def test_the_cap_holds_alpha() -> None:
    """Three conflicts for one agreement ask for alpha 4; the bound gives 1.5."""
    model = coordinates([torch.zeros(4, dtype=torch.float64)], weight_decay=0.0)
    model[0].moments[0].copy_(torch.tensor([1.0, 1, 1, 1]))
    memory = rule.Memory()
    grad = torch.tensor([1.0, -1, -1, -1], dtype=torch.float64)
    assert rule.step_(model, [grad], memory, alpha_max=1.5) == [1.5]
    assert memory == rule.Memory(applied=1.0, alpha=1.5, agree=1.0, conflict=3.0, n=1)


# ---- (2) without conflict it is AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"sync": "delayed"}, {"threshold": 0.1}, {"maximize": True}]
)
@pytest.mark.parametrize("case", ["gamma is 1", "gradients keep their signs", "first step"])
def test_bitwise_adamw(dtype: torch.dtype, options: dict[str, Any], case: str) -> None:
    params = tensors(0, dtype)
    steps = gradients(1 if case == "first step" else 8, dtype, absent=0.2 if case == "gamma is 1" else 0.0)
    if case == "gradients keep their signs":
        signs = [torch.where(g > 0, 1.0, -1.0).to(dtype) for g in steps[0] if g is not None]
        steps = [[None if g is None else s * g.abs() for s, g in zip(signs, step, strict=True)] for step in steps]
    model, memory = coordinates(params), rule.Memory()
    theirs, optimizer = adamw(params, maximize=options.get("maximize", False))
    for grads in steps:
        alphas = rule.step_(model, grads, memory, gamma=1.0 if case == "gamma is 1" else 0.0, **options)
        step_adamw(optimizer, grads)
        assert set(alphas) == {1.0}
    assert memory.applied == len(steps)
    assert memory.conflict == 0
    for c, p, held in zip(model, theirs, optimizer.param_groups[0]["params"], strict=True):
        assert same_bits(c.param, p)
        if held in optimizer.state:
            assert same_bits(c.moments[0], optimizer.state[held]["exp_avg"])
            assert same_bits(c.moments[1], optimizer.state[held]["exp_avg_sq"])


def test_a_conflict_departs_from_adamw() -> None:
    """The other side of the test above: it can tell the two apart."""
    params, steps = tensors(0), gradients(8)
    model, memory = coordinates(params), rule.Memory()
    theirs, optimizer = adamw(params)
    for grads in steps:
        rule.step_(model, grads, memory)
        step_adamw(optimizer, grads)
    assert not same_bits(model[0].param, theirs[0])


@pytest.mark.parametrize("beta1", [0.9, 0.5])
def test_threshold_one_minus_beta_over_beta_is_the_sign_test_on_the_updated_momentum(beta1: float) -> None:
    generator = torch.Generator().manual_seed(2)
    grad, m = (torch.randn(5000, generator=generator, dtype=torch.float64) for _ in range(2))
    updated = m.lerp(grad, 1 - beta1)
    # around an updated momentum of zero the rounding of both sides decides
    clear = updated.abs() > 1e-14
    assert clear.double().mean() > 0.99
    _, conflict = rule.classify(grad, m, (1 - beta1) / beta1)
    assert torch.equal(conflict[clear], (updated * grad < 0)[clear])


# ---- look-ahead


def updated(f: Tensor, **own: Any) -> Tensor:
    """A parameter after one update by ``adam_`` from given moments, none of which is small."""
    generator = torch.Generator().manual_seed(3)
    param, grad, m, v = (torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(4))
    m = m.sign() * (1 + m.abs())
    rule.adam_(param, 8 * grad, m, v.square(), f, **{**SAME, **own})
    return param


@pytest.mark.parametrize("lookahead", [0.25, 1.0])
def test_look_ahead_is_a_soft_factor_by_consistency(lookahead: float) -> None:
    """f = (1 + c rho) / (1 + c), rho = m^ g / m^^2: the mask's place, taken by the paper's product."""
    generator = torch.Generator().manual_seed(3)
    _, grad, m = (torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(3))
    grad = 8 * grad
    m = (m.sign() * (1 + m.abs())).lerp(grad, 1 - SAME["betas"][0]) / (1 - SAME["betas"][0] ** 7)
    soft = (1 + lookahead * m * grad / m.square()) / (1 + lookahead)
    assert (soft < 0).any()
    assert (soft > 1).any()
    ones = torch.ones_like(grad)
    ahead, plain = updated(ones, step=7, lookahead=lookahead), updated(ones, step=7)
    torch.testing.assert_close(ahead, updated(soft, step=7), rtol=1e-12, atol=1e-12)
    assert (ahead - plain).abs().max() > 1e-3


def test_look_ahead_by_one_minus_beta_over_beta_is_nadamw() -> None:
    """Late in a run, where bias corrections, which NAdam has of its own, are 1; its momentum's schedule is over too."""
    generator = torch.Generator().manual_seed(3)
    param, grad, m, v = (torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(4))
    theirs = nn.Parameter(param.clone())
    theirs.grad = grad.clone()
    nadam = torch.optim.NAdam([theirs], **SAME, momentum_decay=1e6, decoupled_weight_decay=True, foreach=False)
    one = torch.ones((), dtype=torch.float64)
    nadam.state[theirs] = {
        "step": 1e5 * one, "mu_product": 0 * one, "exp_avg": m.clone(), "exp_avg_sq": v.square()
    }  # fmt: skip
    nadam.step()
    beta1 = SAME["betas"][0]
    rule.adam_(param, grad, m, v.square(), torch.ones_like(m), step=1e5 + 1, lookahead=(1 - beta1) / beta1, **SAME)
    torch.testing.assert_close(param, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_the_mask_multiplies_what_looks_ahead() -> None:
    """Counts, alpha and moments are those without look-ahead; f is on top of the other direction."""
    ends = []
    for lookahead in (0.0, 0.5):
        model, memory = coordinates(tensors(0, torch.float64), weight_decay=0.0), rule.Memory()
        for grads in gradients(5, torch.float64):
            held = [c.moments[0].clone() for c in model]
            before = [c.param.clone() for c in model]
            rule.step_(model, grads, memory, lookahead=lookahead)
        ends.append((memory, [c.moments for c in model]))
        for c, m, param, g in zip(model, held, before, grads, strict=True):
            assert g is not None
            conflict = m * g < 0
            assert torch.equal(c.param[conflict], param[conflict]), "gamma 0 holds back the whole direction"
    assert ends[0][0] == ends[1][0]
    for ours, theirs in zip(ends[0][1], ends[1][1], strict=True):
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_hard_mask_resembles_look_ahead() -> None:
    """Gradients of noise alone: fitted by m and g, four fifths of the masked step are theirs, as the page says."""
    generator = torch.Generator().manual_seed(0)
    m, beta1 = torch.zeros(100_000), SAME["betas"][0]
    for _ in range(100):
        grad, before = torch.randn(m.shape, generator=generator), m.clone()
        m.lerp_(grad, 1 - beta1)
    agree, conflict = rule.classify(grad, before)
    counts = agree.sum().double(), conflict.sum().double()
    alpha = rule.alpha_from_counts(*counts, gamma=0.0, alpha_max=4.0)
    step = rule.factor(agree, conflict, alpha, torch.zeros(()), m.dtype) * m
    both = torch.stack((m, grad), dim=1)
    weights = torch.linalg.lstsq(both, step[:, None]).solution[:, 0]
    explained = 1 - (step - both @ weights).square().sum() / step.square().sum()
    assert weights.tolist() == pytest.approx([1.31, 0.099], abs=0.01)
    assert float(explained) == pytest.approx(0.80, abs=0.01)


# ---- (3) the scale of the gradients


@pytest.mark.parametrize("exponent", [-40, 1, 16, 30])
@pytest.mark.parametrize(("scope", "sync"), [("global", "exact"), ("layer", "exact"), ("global", "delayed")])
def test_loss_scale_does_not_reach_counts_or_alpha(exponent: int, scope: str, sync: str) -> None:
    seen: list[list[Any]] = []
    for scale in (1.0, 2.0**exponent):
        model, memory = coordinates(tensors(0)), rule.Memory()
        seen.append([])
        for grads in gradients(8):
            scaled = [None if g is None else g * scale for g in grads]
            alphas = rule.step_(model, scaled, memory, scope=scope, sync=sync)
            seen[-1].append((alphas, memory.alpha, memory.agree, memory.conflict))
    assert seen[0] == seen[1]
    assert len({alpha for _, alpha, _, _ in seen[0]}) > 3


def test_clipping_does_not_reach_counts_at_threshold_zero() -> None:
    """Two steps: after more, clipping each by another factor has changed the signs of the momentum itself."""
    seen = []
    for clip_norm in (None, 0.01):
        model, memory = coordinates(tensors(0, torch.float64)), rule.Memory()
        for grads in gradients(2, torch.float64):
            rule.step_(model, grads, memory, clip_norm=clip_norm)
        seen.append((memory.alpha, memory.agree, memory.conflict))
    assert seen[0] == seen[1]
    assert seen[0][2] > 0


# ---- (4) zeros


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"sync": "delayed"}, {"threshold": 0.1}])
def test_zero_padding_changes_nothing(options: dict[str, Any]) -> None:
    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.reshape(-1), torch.zeros(5, dtype=tensor.dtype)])

    params = tensors(0)
    model, memory = coordinates(params), rule.Memory()
    with_padding, its_memory = coordinates([padded(p) for p in params]), rule.Memory()
    for grads in gradients(8):
        alphas = rule.step_(model, grads, memory, **options)
        also = rule.step_(with_padding, [None if g is None else padded(g) for g in grads], its_memory, **options)
        assert alphas == also
        assert memory == its_memory
    for c, longer in zip(model, with_padding, strict=True):
        assert same_bits(c.param.reshape(-1), longer.param[:-5])
        assert same_bits(c.moments[0].reshape(-1), longer.moments[0][:-5])
        assert longer.param[-5:].tolist() == [0.0] * 5


# ---- (5) NaN and inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"gamma": 0.3}, {"scope": "layer"}, {"sync": "delayed"}, {"threshold": 0.1}])
def test_nan_and_inf_land_where_they_land_in_adamw(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params, steps = tensors(0, dtype), gradients(6, dtype)
    for step, index, value in [(2, 3, math.nan), (2, 8, math.inf), (3, 11, -math.inf), (4, 4, math.nan), (4, 8, 1.0)]:
        grad = steps[step][0]
        assert grad is not None
        grad.view(-1)[index] = value
    model, memory = coordinates(params), rule.Memory()
    theirs, optimizer = adamw(params)
    for t, grads in enumerate(steps):
        rule.step_(model, grads, memory, **options)
        step_adamw(optimizer, grads)
        for c, p in zip(model, theirs, strict=True):
            assert torch.equal(c.param.isnan(), p.isnan())
            assert torch.equal(c.param.isinf(), p.isinf())
        assert math.isfinite(memory.alpha)
        assert model[0].param.isfinite().all() == (t < 2)
    assert model[0].param.isnan().sum() == 4
    assert all(c.param.isfinite().all() for c in model[1:])


# ---- None, and steps without evidence


def test_gradient_none_touches_nothing() -> None:
    model, memory = coordinates(tensors(0)), rule.Memory()
    rule.step_(model, gradients(1)[0], memory)
    before = [(c.param.clone(), c.moments[0].clone(), c.moments[1].clone(), c.hyperparameters["step"]) for c in model]
    rule.step_(model, [None, *gradients(1, seed=9)[0][1:]], memory)
    assert same_bits(model[0].param, before[0][0])
    assert same_bits(model[0].moments[0], before[0][1])
    assert model[0].hyperparameters["step"] == 1.0
    assert model[1].hyperparameters["step"] == 2.0


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"sync": "delayed"}, {"clip_norm": 1.0}])
def test_a_step_where_every_gradient_is_none_is_no_step(options: dict[str, Any]) -> None:
    model, memory = coordinates(tensors(0)), rule.Memory()
    rule.step_(model, gradients(1)[0], memory, **options)
    before = [c.param.clone() for c in model]
    held = rule.Memory(**vars(memory))
    assert rule.step_(model, [None] * len(model), memory, **options) == []
    assert memory == replace(held, n=held.n + 1), "n counts steps, with evidence or without"
    assert all(same_bits(c.param, b) for c, b in zip(model, before, strict=True))


@pytest.mark.parametrize("sync", ["exact", "delayed"])
def test_a_step_without_evidence_leaves_the_memory(sync: str) -> None:
    model, memory = coordinates(tensors(0)), rule.Memory()
    for grads in gradients(4):
        rule.step_(model, grads, memory, sync=sync)
    held = rule.Memory(**vars(memory))
    assert held.conflict > 0
    rule.step_(model, [torch.zeros(shape) for shape in SHAPES], memory, sync=sync)
    assert memory == replace(held, n=held.n + 1), "n counts steps, with evidence or without"
    assert [c.hyperparameters["step"] for c in model] == [5.0] * len(model)


# ---- the rule written anew


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["adam", "lion", "sgd"]))
    scope, sync = draw(st.sampled_from([("global", "exact"), ("layer", "exact"), ("global", "delayed")]))
    return {
        "kind": kind,
        "shapes": draw(st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 2**32)),
        "steps": draw(st.integers(1, 6)),
        "absent": draw(st.sampled_from([0.0, 0.3])),
        "zeros": draw(st.sampled_from([0.1, 0.7, 1.0])),
        "options": Options(
            scope=scope,
            sync=sync,
            gamma=draw(st.sampled_from([0.0, 0.3, 1.0])),
            threshold=draw(st.sampled_from([0.0, 1 / 9, 1.0])),
            alpha_max=draw(st.sampled_from([1.0, 1.2, 4.0])),
            alpha_warmup=draw(st.sampled_from([0, 1, 4])),
            clip_norm=draw(st.sampled_from([None, 0.3, 100.0])) if sync == "exact" else None,
            maximize=draw(st.booleans()),
            lookahead=draw(st.sampled_from([0.0, 0.25, 3.0])) if kind == "adam" else 0.0,
        ),
    }


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_the_rule_written_anew_agrees(problem: dict[str, Any]) -> None:
    # Values come from a seed, not from hypothesis: its round numbers would sit on the boundary of a threshold, where
    # the rounding of two ways to write one inequality decides.
    chance, draw = random.Random(problem["seed"]), np.random.default_rng(problem["seed"])
    anew = Rule({"adam": "AlphaAdam", "lion": "AlphaLion", "sgd": "AlphaSGD"}[problem["kind"]], problem["options"])
    model: list[rule.Coordinates] = []
    for i, shape in enumerate(problem["shapes"]):
        start = np.array(draw.normal(size=shape))
        hyper: dict[str, Any] = {"lr": 10 ** chance.uniform(-4, -1), "weight_decay": chance.choice([0.0, 0.1])}
        if problem["kind"] == "sgd":
            hyper |= {"momentum": chance.choice([0.5, 0.9]), "nesterov": chance.random() < 0.5}
        else:
            hyper |= {"betas": (chance.choice([0.0, 0.5, 0.9]), chance.choice([0.9, 0.999]))}
        if problem["kind"] == "adam":
            hyper |= {"eps": 10 ** chance.uniform(-9, -4)}
        anew.add(str(i), start, hyper)
        moments = [torch.zeros(shape, dtype=torch.float64) for _ in MOMENTS[anew.kind]]
        steps = {"step": 0.0} if problem["kind"] == "adam" else {}
        model.append(rule.Coordinates(torch.from_numpy(start.copy()), moments, {**hyper, **steps}))
    memory = rule.Memory()

    for _ in range(problem["steps"]):
        grads: dict[str, Array] = {}
        for name, parameter in anew.parameters.items():
            grad = np.array(draw.normal(size=parameter.value.shape))
            grad[draw.random(grad.shape) < problem["zeros"]] = 0.0
            if draw.random() >= problem["absent"]:
                grads[name] = grad
        anew.step(grads)
        given_ = [torch.from_numpy(grads[name]) if name in grads else None for name in anew.parameters]
        rule.step_(model, given_, memory, getattr(rule, f"{problem['kind']}_"), **vars(problem["options"]))

    counts = anew.memory.T, anew.memory.agree, anew.memory.conflict
    assert (memory.applied, memory.agree, memory.conflict) == counts
    assert memory.alpha == pytest.approx(anew.memory.alpha, rel=1e-15)
    for c, parameter in zip(model, anew.parameters.values(), strict=True):
        assert c.hyperparameters.get("step", parameter.t) == parameter.t
        expected = [parameter.value, *(parameter.moment(name) for name in MOMENTS[anew.kind])]
        for ours, theirs in zip((c.param, *c.moments), expected, strict=True):
            # some ten roundings of float64 a step, over six steps, of numbers near 1
            torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-12, atol=1e-12)
