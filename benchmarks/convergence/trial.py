"""What a run trains: a problem with its seed, ready to go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
