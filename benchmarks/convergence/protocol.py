"""The rounds of the comparison: what is run, and at which learning rate.

1. screening: every optimizer at every learning rate of the task's grid, one seed. Its best goes on.
2. finals: every optimizer at its best rate, five seeds that screening did not use.
3. controls, for four of them, on the same five seeds: without clipping; at twice the best rate; with the learning rate
   of the embedding tuned as well (one seed chooses its multiplier).

The counterexamples have no tuning: every optimizer at every rate, five seeds, and all of it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from . import counterexamples
from .runs import Job, Result
from .tasks import Scale, tasks
from .trial import Task
from .variants import VARIANTS, Variant

SCREENING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
EVALUATIONS = 8
MULTIPLIERS = (1.0, 2.0, 4.0)
CONTROLLED = tuple(variant for variant in VARIANTS if variant.controlled)

Done = Mapping[Job, Result]


def screening(task: Task, done: Done) -> list[Job]:
    return [screened(task, variant, rate) for variant in VARIANTS for rate in task.rates]


def best_rate(task: Task, variant: Variant, done: Done) -> float:
    """The rate of the task's grid, before the optimizer's own scale, with the lowest loss in screening."""
    return min(task.rates, key=lambda rate: done[screened(task, variant, rate)].final)


def best_multiplier(task: Task, variant: Variant, done: Done) -> float:
    """The multiplier of the embedding's learning rate with the lowest loss in screening."""
    best = _at_best(task, variant, done, SCREENING_SEED)
    return min(MULTIPLIERS, key=lambda multiplier: done[replace(best, embedding=multiplier)].final)


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
    return replace(screened(task, variant, best_rate(task, variant, done)), seed=seed)


def screened(task: Task, variant: Variant, rate: float) -> Job:
    return Job(task.name, variant.name, rate * variant.lr_scale, SCREENING_SEED)


def finals(task: Task, done: Done) -> list[Job]:
    return [final(task, variant, done, seed) for variant in VARIANTS for seed in SEEDS]


def controls(task: Task, done: Done) -> list[Job]:
    return [control(task, v, done, seed) for control in (unclipped, doubled) for v in CONTROLLED for seed in SEEDS]


def embedding_screening(task: Task, done: Done) -> list[Job]:
    best = [_at_best(task, variant, done, SCREENING_SEED) for variant in CONTROLLED]
    return [replace(job, embedding=multiplier) for job in best for multiplier in MULTIPLIERS]


def embedding_finals(task: Task, done: Done) -> list[Job]:
    return [embedding_tuned(task, variant, done, seed) for variant in CONTROLLED for seed in SEEDS]


def everything(task: Task, done: Done) -> list[Job]:
    return [
        replace(screened(task, variant, rate), seed=seed)
        for variant in VARIANTS for rate in task.rates for seed in SEEDS
    ]  # fmt: skip


COUNTEREXAMPLES = "counterexamples"
# Each round needs the results of those before it.
ROUNDS: dict[str, Callable[[Task, Done], list[Job]]] = {
    "screening": screening,
    "finals": finals,
    COUNTEREXAMPLES: everything,
    "controls": controls,
    "embedding rates": embedding_screening,
    "embedding": embedding_finals,
}


def tasks_of(name: str, scale: Scale) -> tuple[Task, ...]:
    """The tasks that a round is about."""
    return counterexamples.TASKS if name == COUNTEREXAMPLES else tasks(scale)
