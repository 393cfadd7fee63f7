"""What a run trains, a problem with its seed, and what is tuned for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARMUP = 0.1


@dataclass(frozen=True)
class Trial:
    """Parameters, the loss of each step, and what is measured.

    ``loss(step)`` is a scalar to differentiate; ``evaluate()`` measures without changing anything, a number for each
    held-out document, lower is better; ``project()`` runs after each update. ``embedding`` is apart from ``other`` so
    that its learning rate can be.
    """

    other: list[nn.Parameter]
    loss: Callable[[int], Tensor]
    evaluate: Callable[[], list[float]]
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

    def evaluate() -> list[float]:
        widen()
        return trial.evaluate()

    first = len(trial.other)
    return Trial(copies[:first], loss, evaluate, embedding=copies[first:])


def warmup_and_cosine(steps: int, step: int) -> float:
    """The factor on the learning rate: linear to 1 over the first tenth, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@dataclass(frozen=True)
class Setting:
    """What is tuned. ``rate``: half octaves of the learning rate above 1e-3; ``embedding``: octaves that the
    embedding's rate is above the others'."""

    rate: int
    beta1: float = 0.9
    embedding: int = 0
    lookahead: float = 0.0
    gamma: float = 0.0

    @property
    def lr(self) -> float:
        return float(f"{1e-3 * 2 ** (self.rate / 2):.4g}")


@dataclass(frozen=True)
class Task:
    """A problem to train on. ``start(seed)`` gives equal weights and equal data order to every optimizer.

    ``rate`` is where the search for AdamW's learning rate begins, in half octaves above 1e-3; ``clip`` bounds the
    gradient's norm, None does not. ``tied``: the embedding is the head as well.
    """

    name: str
    title: str
    measure: str
    steps: int
    rate: int
    start: Callable[[int], Trial]
    clip: float | None = None
    tied: bool = False
