"""What the runs say: paired differences with their uncertainty, and how soon a loss was reached."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import protocol
from .protocol import SEEDS, Done
from .runs import Job
from .trial import Task
from .variants import ADAMW, BY_NAME, Variant

# two-sided 95 % quantiles of Student's t by degrees of freedom
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Choose = Callable[[Task, Variant, Done, int], Job]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and half the width of its 95 % confidence interval; nan where a run diverged."""

    mean: float
    half: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """ours - theirs, pair by pair. Raises ValueError where there are fewer than 2 pairs, or more than 10."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) - 1 not in _T:
        raise ValueError(f"{len(differences)} pairs: give 2 to 10")
    if not all(map(math.isfinite, differences)):
        return Difference(math.nan, math.nan)
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(statistics.fmean(differences), _T[len(differences) - 1] * spread)


def losses(task: Task, name: str, done: Done, choose: Choose = protocol.final) -> list[float]:
    """The last held-out loss of each seed, in the order of the seeds."""
    return [done[choose(task, BY_NAME[name], done, seed)].final for seed in SEEDS]


def against(task: Task, name: str, other: str, done: Done, choose: Choose = protocol.final) -> Difference:
    """The difference in held-out loss between two optimizers under the same control."""
    return paired(losses(task, name, done, choose), losses(task, other, done, choose))


def ends(task: Task, variant: Variant, rate: float, done: Done) -> float:
    """Where a counterexample ends at a rate of its grid: the mean over its seeds, not finite where one diverged."""
    return statistics.fmean(
        done[protocol.tuning(task, variant, rate, seed)].final for seed in protocol.COUNTEREXAMPLE_SEEDS
    )


@dataclass(frozen=True)
class Reached:
    """How many seeds reached AdamW's best loss, and after what share of its steps, the mean over those that did."""

    seeds: int
    share: float


def reached_adamw(task: Task, name: str, done: Done) -> Reached:
    shares = []
    for seed in SEEDS:
        theirs = done[protocol.final(task, BY_NAME[ADAMW], done, seed)].curve
        ours = done[protocol.final(task, BY_NAME[name], done, seed)].curve
        at, best = min(theirs, key=lambda point: point[1])
        step = first_below(ours, best)
        if step is not None:
            shares.append(step / at)
    return Reached(len(shares), statistics.fmean(shares) if shares else math.nan)


def first_below(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """The step at which a curve first comes down to ``target``, on straight lines between its points."""
    previous: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if previous is None:
                return float(step)
            before, above = previous
            return before + (step - before) * (above - target) / (above - loss)
        previous = (step, loss)
    return None


def gain_over_training(task: Task, name: str, done: Done) -> list[tuple[int, Difference]]:
    """The paired difference to AdamW at every evaluation of the finals; nothing where a run diverged."""
    ours = [done[protocol.final(task, BY_NAME[name], done, seed)].curve for seed in SEEDS]
    theirs = [done[protocol.final(task, BY_NAME[ADAMW], done, seed)].curve for seed in SEEDS]
    if not all(math.isfinite(loss) for curve in (*ours, *theirs) for _, loss in curve):
        return []
    return [
        (points[0][0], paired([p[1] for p in points[: len(SEEDS)]], [p[1] for p in points[len(SEEDS) :]]))
        for points in zip(*ours, *theirs, strict=True)
    ]
