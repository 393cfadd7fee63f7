"""The rounds of the comparison: what is run, and at which learning rate.

1. screening: every optimizer at every learning rate of the task's grid, one seed.
2. run-off: its two best rates on two more seeds. The lower mean of the three is its best rate.
3. finals: every optimizer at its best rate, five seeds that tuning did not use.
4. controls, for four of them, on the same five seeds: without clipping; at twice the best rate; with the learning rate
   of the embedding tuned as well, on the three tuning seeds.

The counterexamples have no tuning: every optimizer at every rate, three seeds, and all of it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean

from . import counterexamples
from .runs import Job, Result
from .tasks import Scale, tasks
from .trial import Task
from .variants import VARIANTS, Variant

TUNING_SEEDS = (0, 11, 12)
SEEDS = (1, 2, 3, 4, 5)
COUNTEREXAMPLE_SEEDS = (1, 2, 3)
EVALUATIONS = 8
MULTIPLIERS = (1.0, 2.0, 4.0)
CONTROLLED = tuple(variant for variant in VARIANTS if variant.controlled)

Done = Mapping[Job, Result]


def screening(task: Task, done: Done) -> list[Job]:
    return [tuning(task, variant, rate) for variant in VARIANTS for rate in task.rates]


def two_best(task: Task, variant: Variant, done: Done) -> list[float]:
    """The two rates of the task's grid, before the optimizer's own scale, with the lowest losses in screening."""
    return sorted(task.rates, key=lambda rate: done[tuning(task, variant, rate)].final)[:2]


def run_off(task: Task, done: Done) -> list[Job]:
    return [
        tuning(task, variant, rate, seed)
        for variant in VARIANTS for rate in two_best(task, variant, done) for seed in TUNING_SEEDS
    ]  # fmt: skip


def best_rate(task: Task, variant: Variant, done: Done) -> float:
    """That of the two best with the lower mean over the tuning seeds."""

    def loss(rate: float) -> float:
        return fmean(done[tuning(task, variant, rate, seed)].final for seed in TUNING_SEEDS)

    return min(two_best(task, variant, done), key=loss)


def best_multiplier(task: Task, variant: Variant, done: Done) -> float:
    """The multiplier of the embedding's learning rate with the lowest mean over the tuning seeds."""

    def loss(multiplier: float) -> float:
        jobs = (_at_best(task, variant, done, seed) for seed in TUNING_SEEDS)
        return fmean(done[replace(job, embedding=multiplier)].final for job in jobs)

    return min(MULTIPLIERS, key=loss)


def final(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    return replace(_at_best(task, variant, done, seed), evaluations=EVALUATIONS)


def doubled(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    best = _at_best(task, variant, done, seed)
    return replace(best, lr=2 * best.lr)


def unclipped(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    return replace(_at_best(task, variant, done, seed), clip=False)


def embedding_tuned(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    multiplier = best_multiplier(task, variant, done)
    best = final(task, variant, done, seed)
    return best if multiplier == 1 else replace(best, embedding=multiplier, evaluations=1)


def _at_best(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    return tuning(task, variant, best_rate(task, variant, done), seed)


def tuning(task: Task, variant: Variant, rate: float, seed: int = TUNING_SEEDS[0]) -> Job:
    return Job(task.name, variant.name, rate * variant.lr_scale, seed)


def finals(task: Task, done: Done) -> list[Job]:
    return [final(task, variant, done, seed) for variant in VARIANTS for seed in SEEDS]


def controls(task: Task, done: Done) -> list[Job]:
    return [control(task, v, done, seed) for control in (unclipped, doubled) for v in CONTROLLED for seed in SEEDS]


def embedding_tuning(task: Task, done: Done) -> list[Job]:
    best = [_at_best(task, variant, done, seed) for variant in CONTROLLED for seed in TUNING_SEEDS]
    return [replace(job, embedding=multiplier) for job in best for multiplier in MULTIPLIERS]


def embedding_finals(task: Task, done: Done) -> list[Job]:
    return [embedding_tuned(task, variant, done, seed) for variant in CONTROLLED for seed in SEEDS]


def everything(task: Task, done: Done) -> list[Job]:
    return [
        tuning(task, variant, rate, seed)
        for variant in VARIANTS for rate in task.rates for seed in COUNTEREXAMPLE_SEEDS
    ]  # fmt: skip


COUNTEREXAMPLES = "counterexamples"
# Each round needs the results of those before it.
ROUNDS: dict[str, Callable[[Task, Done], list[Job]]] = {
    "screening": screening,
    "run-off": run_off,
    "finals": finals,
    "controls": controls,
    COUNTEREXAMPLES: everything,
    "embedding rates": embedding_tuning,
    "embedding": embedding_finals,
}


def tasks_of(name: str, scale: Scale) -> tuple[Task, ...]:
    """The tasks that a round is about."""
    return counterexamples.TASKS if name == COUNTEREXAMPLES else tasks(scale)


def finished(name: str, scale: Scale, done: Done) -> list[Task]:
    """The tasks for which a round has all its results."""
    return [task for task in tasks_of(name, scale) if _is_finished(name, task, done)]


def _is_finished(name: str, task: Task, done: Done) -> bool:
    try:
        return all(job in done for job in ROUNDS[name](task, done))
    except KeyError:  # a round before it is not finished
        return False
