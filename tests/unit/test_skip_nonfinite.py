"""skip_nonfinite: a step whose gradient norm is NaN or infinite leaves everything as it was, and is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD

from .problems import Twin, gradients, memory_of, parameters_of, tensors

OPTIONS: dict[str, dict[str, Any]] = {
    "global": {},
    "layer": {"scope": "layer"},
    "clipped": {"clip_norm": 2.0},
    "clipped, with a threshold": {"clip_norm": 2.0, "threshold": 0.1},
    "threshold": {"threshold": 0.1},
    "no masks": {"gamma": 1.0, "lookahead": 0.25},
    "no masks, clipped": {"gamma": 1.0, "clip_norm": 2.0},
    "bf16 state": {"state_dtype": "bfloat16"},
}


def poisoned(value: float) -> list[list[Tensor | None]]:
    """Eight steps, of which the first, the third and the fourth have ``value`` in one element."""
    steps = gradients(8)
    for step in (0, 2, 3):
        grad = steps[step][1]
        assert grad is not None
        grad[4] = value
    return steps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("setting", OPTIONS)
def test_it_is_the_rule_bitwise(setting: str, value: float) -> None:
    twin = Twin([{"params": tensors(0), "lr": 1e-2}], skip_nonfinite=True, **OPTIONS[setting])
    returned = [twin.step(grads) for grads in poisoned(value)]
    assert [len(alphas) == 0 for alphas in returned] == [True, False, True, True, False, False, False, False]
    assert twin.differences() == []
    assert memory_of(twin.optimizer)[0] == twin.memory.n == 5


@pytest.mark.parametrize("kind", [AlphaAdam, AlphaLion, AlphaSGD])
@pytest.mark.parametrize("fused", [False, True])
def test_such_a_step_leaves_no_trace(kind: Any, fused: bool) -> None:
    """A run that never saw these gradients has the same bits; without the option they would be everywhere."""
    ends = []
    for leave_out in (False, True):
        optimizer = kind([nn.Parameter(p) for p in tensors(0)], lr=1e-2, fused=fused, skip_nonfinite=True)
        for grads in poisoned(math.nan):
            if leave_out and not all(grad.isfinite().all() for grad in grads if grad is not None):
                continue
            for param, grad in zip(parameters_of(optimizer), grads, strict=True):
                param.grad = grad
            optimizer.step()
        state = [value for param in parameters_of(optimizer) for value in optimizer.state[param].values()]
        ends.append(([*parameters_of(optimizer), *state], memory_of(optimizer), optimizer.metrics()["skipped"]))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert ends[0][1] == ends[1][1]
    assert [skipped for *_, skipped in ends] == [3.0, 0.0]


def test_the_norm_and_the_skipped_steps_are_metrics() -> None:
    optimizer = AlphaAdam([nn.Parameter(torch.ones(2))], skip_nonfinite=True)
    assert (optimizer.metrics()["grad_norm"], optimizer.metrics()["skipped"]) == (None, 0.0)
    for grad, norm, skipped in (([3.0, 4.0], 5.0, 0.0), ([math.inf, 0.0], math.inf, 1.0), ([0.0, 2.0], 2.0, 1.0)):
        parameters_of(optimizer)[0].grad = torch.tensor(grad)
        optimizer.step()
        assert (optimizer.metrics()["grad_norm"], optimizer.metrics()["skipped"]) == (norm, skipped)
    clipped = AlphaAdam([nn.Parameter(torch.ones(2))], clip_norm=1.0)
    parameters_of(clipped)[0].grad = torch.tensor([3.0, 4.0])
    clipped.step()
    assert clipped.metrics()["grad_norm"] == 5.0, "before clipping"
    assert "skipped" not in clipped.metrics()
    assert "grad_norm" not in AlphaAdam([nn.Parameter(torch.ones(2))]).metrics()


@pytest.mark.parametrize("other", [{"sync": "delayed"}, {"capturable": True}], ids=str)
def test_what_cannot_wait_for_the_norm_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"skip_nonfinite=True with .*sync='exact' and capturable=False"):
        AlphaAdam([nn.Parameter(torch.ones(2))], skip_nonfinite=True, **other)


def test_no_step_in_backward() -> None:
    model = nn.Linear(2, 2)
    optimizer = AlphaAdam(model.parameters(), skip_nonfinite=True, gamma=1.0)
    with pytest.raises(ValueError, match=r"skip_nonfinite=True with step_in_backward.* and no skip_nonfinite"):
        optimizer.step_in_backward(model)
