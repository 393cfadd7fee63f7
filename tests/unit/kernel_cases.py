"""Inputs for the tests of kernels: lists of tensors with awkward numbers at awkward addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alphaadam_dist import rule

DIRECTIONS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "adam": (rule.adam_, 2, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}),
    "adam-slow-beta": (rule.adam_, 2, {"lr": 1e-2, "betas": (0.3, 0.9), "eps": 1e-6, "weight_decay": 0.0}),
    "adam-ahead": (
        rule.adam_,
        2,
        {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "lookahead": 0.25},
    ),
    "lion": (rule.lion_, 1, {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    "sgd": (rule.sgd_, 1, {"lr": 1e-2, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1}),
    "nesterov": (rule.sgd_, 1, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}),
}
AWKWARD = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-42, -1e-42, 1e-20, 3e38, -3e38]
SIZES = [0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 100, 1023, 1024, 1025, 16384, 40001]


def awkward(count: int, generator: torch.Generator, dtype: torch.dtype, special: float) -> Tensor:
    """Normal numbers, of which about the share ``special`` is replaced by zeros, denormals, infinities and NaN."""
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    chosen = torch.randint(len(AWKWARD), (count,), generator=generator)
    return torch.where(
        torch.rand(count, generator=generator) < special, torch.tensor(AWKWARD, dtype=torch.float64)[chosen], values
    ).to(dtype)


def placed(values: Tensor, offset: int) -> Tensor:
    """The same values at an address that vectors don't like."""
    return torch.cat((values.new_zeros(offset), values))[offset:]


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def case(
    direction: str, sizes: list[int], seed: int, dtype: torch.dtype, special: float, offset: int
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)

    def tensors() -> list[Tensor]:
        return [placed(awkward(size, generator, dtype, special), offset) for size in sizes]

    moments = [tensors() for _ in range(DIRECTIONS[direction][1])]
    if len(moments) > 1:
        moments[1] = [second.abs() for second in moments[1]]
    return tensors(), tensors(), moments


def options_of_update(direction: str, tensors: int, threshold: float, scale: Any) -> dict[str, Any]:
    """For an update that counts and takes norms, with strengths and a step of each tensor's own."""
    return {
        "strengths": torch.tensor([[1.0 + i, 0.25] for i in range(tensors)], dtype=torch.float64).reshape(-1, 2),
        "threshold": threshold, "scale": scale, "counting": True, "norms": True,
        "hyperparameters": DIRECTIONS[direction][2],
        "steps": [1.0 + 9 * i for i in range(tensors)] if "adam" in direction else None,
    }  # fmt: skip


def assert_norms(
    norms: Tensor | None, grads: list[Tensor], before: list[Tensor], params: list[Tensor], computed: torch.dtype
) -> None:
    """Squared norms of an update: of gradients in the dtype that is computed in, and of what parameters moved by."""
    expected = [
        [float((grad.to(computed).double() ** 2).sum()), float(((param.double() - was.double()) ** 2).sum())]
        for grad, was, param in zip(grads, before, params, strict=True)
    ]
    assert norms is not None
    plain = torch.tensor(expected, dtype=torch.float64).reshape(-1, 2)
    torch.testing.assert_close(norms.cpu(), plain, rtol=1e-12, atol=0.0, equal_nan=True)


def with_odd_ones() -> dict[str, Tensor]:
    """Parameters of one list; the kernels take all but the last two."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4, 6, 8, 10, generator=generator)
    return {
        "plain": made[0].clone(), "transposed gradient": made[1].clone(),
        "channels_last": made.clone(memory_format=torch.channels_last), "transposed": made[2].clone().mT,
        "bf16": made[3].bfloat16(), "gaps": made[3][:, ::2].clone(memory_format=torch.preserve_format)[:, :, ::2],
    }  # fmt: skip
