"""What the runs say: paired differences with their uncertainty, corrected for how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import mpmath

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, half the width of its 95 % interval, and the two-sided p of "it is 0".

    nan where a run diverged.
    """

    mean: float
    half: float
    p: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half


def paired(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Difference:
    """ours - theirs. A row a seed, in it a loss for each held-out document, the same documents in all rows.

    Two things are drawn by lot, the seeds and the documents, and the mean would vary with either. The variance of the
    means of rows by their number, plus that of the means of columns by theirs, is an estimate of its variance that is
    never too small on average: what varies by seed and document together is in both. Student's t, with Satterthwaite's
    degrees of freedom. With one document the uncertainty is the seeds' alone.

    Raises:
        ValueError: fewer than 2 seeds.
    """
    if len(ours) < 2:
        raise ValueError(f"{len(ours)} seeds: give at least 2")
    if not all(ours) or not all(theirs):
        return Difference(math.nan, math.nan, math.nan)
    rows = [[a - b for a, b in zip(*of_seed, strict=True)] for of_seed in zip(ours, theirs, strict=True)]
    means = [list(map(fmean, rows)), list(map(fmean, zip(*rows, strict=True)))]
    parts = [(stdev(of_one) ** 2 / len(of_one), len(of_one) - 1) for of_one in means if len(of_one) > 1]
    variance = sum(part for part, _ in parts)
    mean = fmean(means[0])
    if variance == 0:
        return Difference(mean, 0.0, float(mean == 0))
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    return Difference(mean, quantile(freedom) * math.sqrt(variance), tail(mean / math.sqrt(variance), freedom))


def tail(t: float, freedom: float) -> float:
    """The probability that Student's t is further from 0 than ``t``."""
    return float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


def quantile(freedom: float) -> float:
    """The t beyond which, on both sides together, a share of LEVEL lies."""
    low, high = 0.0, 1.0
    while tail(high, freedom) > LEVEL:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > LEVEL else (low, middle)
    return high


def holm(differences: Sequence[Difference]) -> list[bool]:
    """Which stay clear of 0 when all are looked at together (Holm 1979): one table in twenty has a false one."""
    order = sorted(range(len(differences)), key=lambda i: (math.isnan(differences[i].p), differences[i].p))
    clear = [False] * len(differences)
    for rank, i in enumerate(order):
        if not differences[i].p <= LEVEL / (len(differences) - rank):
            break
        clear[i] = True
    return clear


def trend(short: Difference, long: Difference) -> str:
    """What becomes of a gain over a loss, from the shortest run or smallest model to the longest or largest.

    A gain is a negative difference, clear of 0. That one is smaller than the other is said where their intervals do not
    meet.
    """
    if math.isnan(short.mean) or math.isnan(long.mean):
        return "diverged"
    at_first, at_last = (end.clear and end.mean < 0 for end in (short, long))
    if not at_last:
        return "worse" if long.clear else "gone" if at_first else "none"
    if not at_first:
        return "comes late"
    if long.mean - long.half > short.mean + short.half:
        return "shrinks"
    return "grows" if long.mean + long.half < short.mean - short.half else "lasts"


def saved(gain: Difference, before: float, after: float, factor: float) -> float:
    """The share of AdamW's steps that a gain is worth, from its losses before and after ``factor`` times the steps.

    Where the loss falls by ``before - after`` in log(factor) of steps, and goes on so, a gain is as much as
    factor ** (gain / fall) times the steps would give. nan where the fall is no more than the gain, which says nothing.
    """
    fall = before - after
    return 1 - factor ** (gain.mean / fall) if fall > abs(gain.mean) else math.nan
