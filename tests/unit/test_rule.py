"""The parts of the rule, against exact arithmetic and against torch.optim.AdamW."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from alphaadam_dist import rule

from .problems import same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN, INF = math.nan, math.inf


def names(agree: Tensor, conflict: Tensor) -> list[str]:
    assert agree.dtype == conflict.dtype == torch.bool
    assert not (agree & conflict).any()
    return [
        "agree" if a else "conflict" if c else "neutral" for a, c in zip(agree.tolist(), conflict.tolist(), strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("g", "m", "at_zero", "above"),
    [
        (1.0, 2.0, "agree", "agree"),
        (-1.0, -2.0, "agree", "agree"),
        (1.0, -2.0, "conflict", "conflict"),
        (-1.0, 2.0, "conflict", "conflict"),
        (1.0, -0.25, "conflict", "agree"),  # weaker than the threshold of 0.5
        (0.0, 1.0, "neutral", "neutral"),
        (-0.0, 1.0, "neutral", "neutral"),
        (-0.0, -1.0, "neutral", "neutral"),
        (0.0, INF, "neutral", "neutral"),
        (0.0, NAN, "neutral", "neutral"),
        (1.0, 0.0, "agree", "agree"),  # no history is no conflict
        (1.0, -0.0, "agree", "agree"),
        (-1.0, 0.0, "agree", "agree"),
        (NAN, 1.0, "agree", "agree"),  # NaN is evidence, and no comparison with it holds
        (NAN, -INF, "agree", "agree"),
        (1.0, NAN, "agree", "agree"),
        (INF, 1.0, "agree", "agree"),
        (INF, -1.0, "conflict", "agree"),  # -1 * inf < -0.5 * inf is false
        (-INF, 1.0, "conflict", "agree"),
        (1.0, -INF, "conflict", "conflict"),
        (-1.0, INF, "conflict", "conflict"),
        (INF, -INF, "conflict", "agree"),
        (INF, INF, "agree", "agree"),
    ],
)
def test_one_coordinate(dtype: torch.dtype, g: float, m: float, at_zero: str, above: str) -> None:
    grad, exp_avg = torch.tensor([g], dtype=dtype), torch.tensor([m], dtype=dtype)
    assert names(*rule.classify(grad, exp_avg)) == [at_zero]
    assert names(*rule.classify(grad, exp_avg, 0.5)) == [above]


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_compare_by_sign_although_their_product_underflows(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
    grad = torch.tensor([tiny, -tiny, tiny, -tiny], dtype=torch.float64).to(dtype)
    exp_avg = torch.tensor([tiny, tiny, -tiny, -tiny], dtype=torch.float64).to(dtype)
    assert (grad != 0).all()
    assert (grad * exp_avg == 0).all()
    assert names(*rule.classify(grad, exp_avg)) == ["agree", "conflict", "conflict", "agree"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_compare_by_sign_although_their_product_overflows(dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max
    grad = torch.tensor([big, -big], dtype=dtype)
    exp_avg = torch.tensor([big, big], dtype=dtype)
    assert names(*rule.classify(grad, exp_avg)) == ["agree", "conflict"]
    assert names(*rule.classify(grad, exp_avg, 0.5)) == ["agree", "conflict"]


def exact(grad: Tensor, exp_avg: Tensor, tau: float) -> list[str]:
    """The printed inequality in rational numbers."""
    result = []
    for g, m in zip(grad.double().tolist(), exp_avg.double().tolist(), strict=True):
        a, b = Fraction(g), Fraction(m)
        result.append("neutral" if a == 0 else "conflict" if b * a < -Fraction(tau) * a * a else "agree")
    return result


def pairs(dtype: torch.dtype, tau: float) -> tuple[Tensor, Tensor]:
    """Gradients over many binades, and moments that oppose most of them by about the threshold."""
    generator = torch.Generator().manual_seed(3)
    span = 8 if dtype == torch.float16 else 12  # float16 is subnormal below 2^-14
    grad = torch.rand(6000, generator=generator, dtype=torch.float64) + 0.5
    grad[torch.rand(6000, generator=generator) < 0.5] *= -1
    grad *= torch.exp2(torch.randint(-span, span, grad.shape, generator=generator).double())
    grad[::50] = 0
    grad = grad.to(dtype)
    exp_avg = (-tau * grad.double() * (1 + 0.05 * torch.randn(6000, generator=generator))).to(dtype)
    exp_avg[1::3] = torch.randn(2000, generator=generator).to(dtype)
    return grad, exp_avg


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.5, 0.125, 2.0])
def test_threshold_is_exact_where_it_is_a_power_of_two(dtype: torch.dtype, tau: float) -> None:
    grad, exp_avg = pairs(dtype, tau)
    exp_avg[2::3] = (-tau * grad.double()).to(dtype)[2::3]  # on the boundary: no conflict
    assert names(*rule.classify(grad, exp_avg, tau)) == exact(grad, exp_avg, tau)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1 / 9, 0.3, 1e-3])
def test_threshold_against_exact_arithmetic(dtype: torch.dtype, tau: float) -> None:
    """Only the product tau * |g| is rounded: moments further than two roundings from it are judged exactly."""
    grad, exp_avg = pairs(dtype, tau)
    boundary = tau * grad.double().abs()
    # half an eps for the rounding of tau to the type of the arithmetic, half for that of the product; a product in
    # the subnormals, which float16 meets here, is rounded by up to one of its steps instead
    finfo = torch.finfo(dtype)
    undecided = finfo.eps * boundary + finfo.smallest_normal * finfo.eps
    decided = ((exp_avg.double().abs() - boundary).abs() > undecided) | (grad == 0)
    assert decided.double().mean() > 0.8  # a spread of 5 percent is 6 or more roundings, in bfloat16 too
    judged = names(*rule.classify(grad, exp_avg, tau))
    wrong = [i for i, (a, b) in enumerate(zip(judged, exact(grad, exp_avg, tau), strict=True)) if a != b]
    assert not decided[wrong].any()
    assert {"agree", "conflict", "neutral"} == set(judged)


def test_a_gradient_of_lower_precision_is_judged_in_the_precision_of_its_moment() -> None:
    """As under DeepSpeed: bf16 gradients, fp32 moments. tau * |g| must not be rounded to bf16."""
    grad = torch.tensor([1.0, 1.0, -3.0], dtype=torch.bfloat16)
    exp_avg = torch.tensor([-0.1001, -0.0999, 0.3002])
    assert names(*rule.classify(grad, exp_avg, 0.1)) == ["conflict", "agree", "conflict"]


def test_classify_mutates_nothing_and_any_positive_scale_gives_the_same_signs() -> None:
    generator = torch.Generator().manual_seed(5)
    grad, exp_avg = torch.randn(500, generator=generator), torch.randn(500, generator=generator)
    grad[::7] = 0
    before = grad.clone(), exp_avg.clone()
    expected = names(*rule.classify(grad, exp_avg))
    assert same_bits(grad, before[0])
    assert same_bits(exp_avg, before[1])
    for scale in (2.0**-60, 1e-3, 3.0, 65536.0):
        assert names(*rule.classify(grad * scale, exp_avg)) == expected
        assert names(*rule.classify(grad, exp_avg * scale)) == expected


@pytest.mark.parametrize(
    ("agree", "conflict", "gamma", "alpha_max", "expected"),
    [
        (0.0, 0.0, 0.0, 4.0, 1.0),
        (0.0, 7.0, 0.0, 4.0, 1.0),  # nothing could make up for it
        (10.0, 0.0, 0.0, 4.0, 1.0),
        (10.0, 10.0, 0.0, 4.0, 2.0),
        (4.0, 3.0, 0.0, 4.0, 1.75),
        (4.0, 3.0, 0.5, 4.0, 1.375),
        (4.0, 3.0, 1.0, 4.0, 1.0),
        (1.0, 3.0, 0.0, 4.0, 4.0),
        (1.0, 300.0, 0.0, 4.0, 4.0),
        (1.0, 300.0, 0.0, math.inf, 301.0),
        (1.0, 300.0, 0.0, 1.0, 1.0),
    ],
)
def test_alpha_from_counts(agree: float, conflict: float, gamma: float, alpha_max: float, expected: float) -> None:
    scalars = torch.tensor(agree, dtype=torch.float64), torch.tensor(conflict, dtype=torch.float64)
    alpha = rule.alpha_from_counts(*scalars, gamma, alpha_max)
    assert alpha.dtype == torch.float64
    assert float(alpha) == expected
    rows = rule.alpha_from_counts(scalars[0].expand(3), scalars[1].expand(3), gamma, alpha_max)
    assert rows.tolist() == [expected] * 3


def test_alpha_of_counts_near_two_to_the_53_is_exact() -> None:
    agree, conflict = torch.tensor(2.0**52, dtype=torch.float64), torch.tensor(2.0**52 + 2, dtype=torch.float64)
    assert float(rule.alpha_from_counts(agree, conflict, 0.0, 4.0)) == 2 + 2.0**-51


@pytest.mark.parametrize(
    ("applied", "warmup", "r"), [(1.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 4, 0.25), (4.0, 4, 1.0), (9.0, 4, 1.0)]
)
def test_strengths_and_warm_up(applied: float, warmup: int, r: float) -> None:
    alpha = torch.tensor([1.5, 3.0], dtype=torch.float64)
    f_agree, f_conflict = rule.strengths(alpha, torch.tensor(applied, dtype=torch.float64), 0.25, warmup)
    # every number here is a dyadic fraction
    assert f_agree.tolist() == [1 + r * 0.5, 1 + r * 2.0]
    assert float(f_conflict) == 1 - r * 0.75


@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_is_one_where_neutral(dtype: torch.dtype) -> None:
    agree, conflict = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    f = rule.factor(agree, conflict, torch.tensor(2.5, dtype=torch.float64), torch.tensor(0.25).double(), dtype)
    assert f.dtype == dtype
    assert f.tolist() == [2.5, 0.25, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.4, 0.0)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update_with_f_one_is_adamw_bitwise(
    dtype: torch.dtype, betas: tuple[float, float], weight_decay: float
) -> None:
    generator = torch.Generator().manual_seed(7)
    param = torch.randn(9, 11, generator=generator).to(dtype)
    theirs = torch.nn.Parameter(param.clone())
    adamw = torch.optim.AdamW(
        [theirs], lr=3e-3, betas=betas, eps=1e-6, weight_decay=weight_decay, foreach=False, fused=False
    )
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    for t in range(1, 8):
        grad = torch.randn(9, 11, generator=generator).to(dtype)
        grad[t] = 0
        theirs.grad = grad.clone()
        adamw.step()
        rule.adam_(
            param, grad, exp_avg, exp_avg_sq, torch.ones_like(param),
            step=float(t), lr=3e-3, betas=betas, eps=1e-6, weight_decay=weight_decay,
        )  # fmt: skip
        assert same_bits(grad, theirs.grad)
        assert same_bits(param, theirs.data)
        assert same_bits(exp_avg, adamw.state[theirs]["exp_avg"])
        assert same_bits(exp_avg_sq, adamw.state[theirs]["exp_avg_sq"])


DIRECTIONS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "adam": (rule.adam_, 2, {"step": 3.0, "betas": (0.9, 0.999), "eps": 1e-8}),
    "lion": (rule.lion_, 1, {"betas": (0.9, 0.99)}),
    "sgd": (rule.sgd_, 1, {"momentum": 0.9, "nesterov": False}),
    "nesterov": (rule.sgd_, 1, {"momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_bit_depends_on_where_an_element_lies(direction: str, dtype: torch.dtype) -> None:
    """torch computes what fills a vector and what is left over in two ways; in 16 bits they round differently."""
    function, moments, own = DIRECTIONS[direction]
    generator = torch.Generator().manual_seed(4)

    def values() -> Tensor:
        wide = torch.randn(601, generator=generator, dtype=torch.float64)
        return (wide * torch.exp2(torch.randint(-5, 6, wide.shape, generator=generator).double())).to(dtype)

    def updated(size: int, strided: bool) -> list[Tensor]:
        mutated = [t.clone() for t in (param, *held)]
        for part in torch.arange(len(param)).split(size):
            of_part = [t[part].repeat_interleave(2)[::2] if strided else t[part] for t in mutated]
            function(of_part[0], grad[part], *of_part[1:], f[part], **hyperparameters)
            for t, new in zip(mutated, of_part, strict=True):
                t[part] = new
        return mutated

    param, grad, held = values(), values(), [values().abs() for _ in range(moments)]
    f = torch.where(torch.rand(601, generator=generator) < 0.5, 1.7, 0.1).to(dtype)
    hyperparameters = {"lr": 0.03, "weight_decay": 0.1, **own}
    whole = updated(len(param), False)
    for size, strided in ((5, False), (33, False), (len(param), True)):
        assert all(same_bits(a, b) for a, b in zip(whole, updated(size, strided), strict=True)), (size, strided)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_sum_in_16_bits_is_rounded_once(dtype: torch.dtype) -> None:
    """The scale is rounded as torch rounds it, then the sum: fractions say to what."""
    generator = torch.Generator().manual_seed(6)
    into, tensor = (torch.randn(500, generator=generator).to(dtype) for _ in range(2))
    scale = torch.tensor(-0.0123, dtype=torch.float64).to(dtype)
    exact = [
        Fraction(a) + Fraction(float(scale)) * Fraction(b) for a, b in zip(into.tolist(), tensor.tolist(), strict=True)
    ]
    # a float64 holds these sums of two numbers of 11 bits and of 22 without rounding
    assert all(Fraction(float(one)) == one for one in exact)
    expected = torch.tensor([float(one) for one in exact], dtype=torch.float64).to(dtype)
    assert same_bits(rule.add_scaled_(into, tensor, -0.0123), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_a_tensor_rate_of_other_dtypes_is_its_number(dtype: torch.dtype) -> None:
    """1 - lr * decay is not computed in 8 bits."""
    lr = torch.tensor(2.0**-8 if dtype.is_floating_point else 1, dtype=dtype)
    assert rule.decay_of(lr, 0.1) == 1 - float(lr) * 0.1
    assert rule.size_of(lr, 0.3) == -(float(lr) / 0.3)
    assert rule.sizes_of(lr, 0.9, [1.0, 2.0, 1.0]) == [-(float(lr) / (1 - 0.9**t)) for t in (1.0, 2.0, 1.0)]


def test_update_multiplies_the_direction_and_nothing_else() -> None:
    """f changes p by its share of the step; decay and both moments don't see it."""
    generator = torch.Generator().manual_seed(8)
    start = torch.randn(40, generator=generator, dtype=torch.float64)
    grad, m = (torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.rand(40, generator=generator, dtype=torch.float64)
    f = torch.linspace(0, 4, 40, dtype=torch.float64)

    def updated(strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, first, second = start.clone(), m.clone(), v.clone()
        rule.adam_(p, grad, first, second, strength, step=3.0, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.3)
        return p, first, second

    ours, adamw = updated(f), updated(torch.ones_like(f))
    assert same_bits(ours[1], adamw[1])
    assert same_bits(ours[2], adamw[2])
    decayed = start * (1 - 1e-2 * 0.3)
    # a handful of float64 roundings of numbers near 1
    torch.testing.assert_close(ours[0] - decayed, f * (adamw[0] - decayed), rtol=0, atol=1e-14)
    assert same_bits(ours[0][:1], decayed[:1])  # f = 0 moves by the decay only
