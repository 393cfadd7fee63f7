"""The search for an optimizer's best setting: one axis after the other, each until its best value lies inside.

Every optimizer is tuned by this and by nothing else. It asks for losses and is a pure function of them, so it goes on
where an interrupted one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .trial import Setting

# The values of an axis that has ends. A rate and an embedding's multiple go on as far as they get better.
LADDERS = {
    "beta1": (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
    "lookahead": (0.0, 1 / 9, 0.25, 0.5, 1.0, 2.0, 4.0),
    "gamma": (0.0, 0.25, 0.5, 0.75, 1.0),
}
Losses = Callable[[list[Setting]], list[float]]


def search(start: Setting, axes: Sequence[str], losses: Losses) -> Setting:
    """The setting that no neighbour on any axis beats. ``losses`` raises where one of them is not known yet."""
    best = start
    while True:
        before = best
        for axis in axes:
            best = along(axis, best, losses)
        if best == before:
            return best


def along(axis: str, best: Setting, losses: Losses) -> Setting:
    """The best on one axis: the way goes down from ``best`` until both neighbours are no better."""
    while True:
        near = [best, *neighbours(axis, best)]
        found = losses(near)
        winner = near[found.index(min(found))]
        if winner == best:
            return best
        best = winner


def neighbours(axis: str, setting: Setting) -> list[Setting]:
    """The settings beside this one on an axis: two, or one at an end."""
    value: Any = getattr(setting, axis)
    ladder: Sequence[Any] = LADDERS[axis] if axis in LADDERS else range(value - 1, value + 2)
    place = ladder.index(value)
    return [replace(setting, **{axis: ladder[i]}) for i in (place - 1, place + 1) if 0 <= i < len(ladder)]


def at_end(setting: Setting, axes: Sequence[str]) -> list[str]:
    """The axes on which the best value is the last that was offered."""
    return [
        axis for axis in axes if axis in LADDERS and getattr(setting, axis) in (LADDERS[axis][0], LADDERS[axis][-1])
    ]
