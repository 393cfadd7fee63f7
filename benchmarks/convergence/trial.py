"""What a run trains: a problem with its seed, ready to go."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Trial:
    """Parameters, the loss of each step, and what is measured.

    ``loss(step)`` is a scalar to differentiate; ``evaluate()`` measures without changing anything, lower is better;
    ``project()`` runs after each update. ``embedding`` is apart from ``other`` so that its learning rate can be.
    """

    other: list[nn.Parameter]
    loss: Callable[[int], Tensor]
    evaluate: Callable[[], float]
    embedding: list[nn.Parameter] | None = None
    project: Callable[[], None] | None = None


def with_bf16_parameters(trial: Trial) -> Trial:
    """The trial over bf16 copies of its parameters, whose gradients come in bf16.

    Losses are computed in fp32 from their values, so that what differs is what the optimizer rounds.
    """
    params = [*trial.other, *(trial.embedding or [])]
    copies = [nn.Parameter(param.detach().bfloat16()) for param in params]

    def hand_over(copy: nn.Parameter, param: Tensor) -> None:
        assert param.grad is not None
        copy.grad, param.grad = param.grad.bfloat16(), None

    for param, copy in zip(params, copies, strict=True):
        param.register_post_accumulate_grad_hook(functools.partial(hand_over, copy))

    @torch.no_grad()
    def widen() -> None:
        for param, copy in zip(params, copies, strict=True):
            param.copy_(copy)

    def loss(step: int) -> Tensor:
        widen()
        return trial.loss(step)

    def evaluate() -> float:
        widen()
        return trial.evaluate()

    first = len(trial.other)
    return Trial(copies[:first], loss, evaluate, embedding=copies[first:])


@dataclass(frozen=True)
class Task:
    """A problem to train on. ``start(seed)`` gives equal weights and equal data order to every optimizer.

    ``rates`` is the grid of learning rates; ``clip`` bounds the global norm of the gradient, None does not.
    """

    name: str
    title: str
    measure: str
    steps: int
    rates: tuple[float, ...]
    start: Callable[[int], Trial]
    clip: float | None = None
