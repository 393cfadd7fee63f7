"""torch.compile around a step: it is left alone, and gives the numbers that it gives without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD

from .problems import gradients, memory_of, parameters_of, same_bits, tensors

STEPS = 20


def run(kind: Any, how: str, **options: Any) -> tuple[list[Any], list[nn.Parameter], int]:
    """Steps under a schedule. How many frames torch.compile looked at after the first."""
    optimizer = kind([nn.Parameter(p) for p in tensors(0)], lr=1e-2, weight_decay=0.1, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    compiled: Any = None
    if how == "the method":
        compiled = torch.compile(optimizer.step, backend="eager")
    elif how == "a function around it":

        @torch.compile(backend="eager")
        def compiled() -> None:
            optimizer.step()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen, frames = [], 0
    for i, grads in enumerate(gradients(STEPS, absent=0.2)):
        for param, grad in zip(parameters_of(optimizer), grads, strict=True):
            param.grad = grad
        (compiled or optimizer.step)()
        scheduler.step()
        seen.append(memory_of(optimizer))
        if i == 0:
            frames = torch._dynamo.utils.counters["frames"]["total"]
    return seen, parameters_of(optimizer), torch._dynamo.utils.counters["frames"]["total"] - frames


@pytest.mark.parametrize("how", ["the method", "a function around it"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(AlphaAdam, {"fused": True}), (AlphaAdam, {"scope": "layer"}), (AlphaLion, {"sync": "delayed"}),
     (AlphaSGD, {"clip_norm": 1.0, "threshold": 0.1})],
)  # fmt: skip
def test_a_compiled_step_is_the_step(kind: Any, options: dict[str, Any], how: str) -> None:
    expected = run(kind, "not at all", **options)
    seen, params, frames = run(kind, how, **options)
    assert seen == expected[0]
    assert all(same_bits(a, b) for a, b in zip(params, expected[1], strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0, "there is nothing to compile in it"
    assert frames == 0, "compiled anew from step to step"


def test_a_step_in_a_compiled_function_is_one_graph_break() -> None:
    (param, *_), (grad, *_) = tensors(0), next(iter(gradients(1)))
    weight = nn.Parameter(param)
    optimizer = AlphaAdam([weight])
    weight.grad = grad

    def train() -> torch.Tensor:
        before = weight * 2
        optimizer.step()
        return before + weight

    torch._dynamo.reset()
    found = torch._dynamo.explain(train)()
    assert (found.graph_count, found.graph_break_count) == (2, 1)
