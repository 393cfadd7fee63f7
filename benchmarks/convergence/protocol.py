"""The rounds of the comparison: what is run, and at which learning rate.

1. screening: every optimizer at every learning rate of the task's grid, one seed.
2. run-off: its two best rates on two more seeds. The lower mean of the three is its best rate.
3. finals: every optimizer at its best rate, five seeds that tuning did not use.
4. controls, for four of them, on the same five seeds: without clipping; at twice the best rate.
5. tuned controls, each with one more choice made on the three tuning seeds: for every optimizer the learning rate of
   the embedding, up to 16 times the best; for the same four, four times as many steps, at half to twice the best rate.

The counterexamples have no tuning: every optimizer at every rate, three seeds, and all of it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from .runs import Job, Result
from .trial import Task
from .variants import Variant

TUNING_SEEDS = (0, 11, 12)
SEEDS = (1, 2, 3, 4, 5)
COUNTEREXAMPLE_SEEDS = (1, 2, 3)
EVALUATIONS = 8
EMBEDDING_MULTIPLIERS = (1.0, 4.0, 16.0)
LONGER, LONGER_MULTIPLIERS = 4, (2.0, 1.0, 0.5)

Done = Mapping[Job, Result]
Alternatives = Callable[[Job], list[Job]]


@dataclass(frozen=True)
class Study:
    """What is compared on what, and the results so far, which grow while it runs."""

    tasks: tuple[Task, ...]
    counterexamples: tuple[Task, ...]
    variants: tuple[Variant, ...]
    done: Done

    @property
    def controlled(self) -> list[Variant]:
        return [variant for variant in self.variants if variant.controlled]

    def tasks_of(self, name: str) -> tuple[Task, ...]:
        """The tasks that a round is about."""
        return self.counterexamples if name == COUNTEREXAMPLES else self.tasks

    def finished(self, name: str) -> list[Task]:
        """The tasks for which a round has all its results."""
        return [task for task in self.tasks_of(name) if self._is_finished(name, task)]

    def _is_finished(self, name: str, task: Task) -> bool:
        try:
            return all(job in self.done for job in ROUNDS[name](self, task))
        except KeyError:  # a round before it is not finished
            return False


def screening(study: Study, task: Task) -> list[Job]:
    return [tuning(task, variant, rate) for variant in study.variants for rate in task.rates]


def two_best(task: Task, variant: Variant, done: Done) -> list[float]:
    """The two rates of the task's grid, before the optimizer's own scale, with the lowest losses in screening."""
    return sorted(task.rates, key=lambda rate: screened(task, variant, rate, done))[:2]


def screened(task: Task, variant: Variant, rate: float, done: Done) -> float:
    """The loss in screening."""
    return done[tuning(task, variant, rate)].final


def run_off(study: Study, task: Task) -> list[Job]:
    return [
        tuning(task, variant, rate, seed)
        for variant in study.variants for rate in two_best(task, variant, study.done) for seed in TUNING_SEEDS
    ]  # fmt: skip


def best_rate(task: Task, variant: Variant, done: Done) -> float:
    """That of the two best with the lower mean over the tuning seeds."""
    return min(two_best(task, variant, done), key=lambda rate: tuning_loss(task, variant, rate, done))


def tuning_loss(task: Task, variant: Variant, rate: float, done: Done) -> float:
    """The mean over the tuning seeds."""
    return fmean(done[tuning(task, variant, rate, seed)].final for seed in TUNING_SEEDS)


def embeddings(best: Job) -> list[Job]:
    """Tuned control: the same run with another learning rate for the embedding."""
    return [replace(best, embedding=multiplier) for multiplier in EMBEDDING_MULTIPLIERS]


def longer(best: Job) -> list[Job]:
    """Tuned control: a longer run, at about the best rate of the short one."""
    return [replace(best, lr=best.lr * multiplier, length=LONGER) for multiplier in LONGER_MULTIPLIERS]


def chosen(alternatives: Alternatives, task: Task, variant: Variant, done: Done) -> int:
    """Which of a control's alternatives has the lowest mean over the tuning seeds."""
    of_seeds = [alternatives(_at_best(task, variant, done, seed)) for seed in TUNING_SEEDS]
    means = [fmean(done[job].final for job in jobs) for jobs in zip(*of_seeds, strict=True)]
    return means.index(min(means))


def final(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    return replace(_at_best(task, variant, done, seed), evaluations=EVALUATIONS)


def doubled(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    best = _at_best(task, variant, done, seed)
    return replace(best, lr=2 * best.lr)


def unclipped(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    return replace(_at_best(task, variant, done, seed), clip=False)


def embedding_tuned(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    return embeddings(final(task, variant, done, seed))[chosen(embeddings, task, variant, done)]


def four_times(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    return longer(final(task, variant, done, seed))[chosen(longer, task, variant, done)]


def _at_best(task: Task, variant: Variant, done: Done, seed: int) -> Job:
    return tuning(task, variant, best_rate(task, variant, done), seed)


def tuning(task: Task, variant: Variant, rate: float, seed: int = TUNING_SEEDS[0]) -> Job:
    return Job(task.name, variant.name, rate * variant.lr_scale, seed)


def finals(study: Study, task: Task) -> list[Job]:
    return [final(task, variant, study.done, seed) for variant in study.variants for seed in SEEDS]


def controls(study: Study, task: Task) -> list[Job]:
    return [
        choose(task, variant, study.done, seed)
        for choose in (unclipped, doubled) for variant in study.controlled for seed in SEEDS
    ]  # fmt: skip


def tuning_of_controls(study: Study, task: Task) -> list[Job]:
    return [
        job
        for alternatives, variants in ((embeddings, study.variants), (longer, study.controlled))
        for variant in variants for seed in TUNING_SEEDS
        for job in alternatives(_at_best(task, variant, study.done, seed))
    ]  # fmt: skip


def tuned_controls(study: Study, task: Task) -> list[Job]:
    return [
        choose(task, variant, study.done, seed)
        for choose, variants in ((embedding_tuned, study.variants), (four_times, study.controlled))
        for variant in variants for seed in SEEDS
    ]  # fmt: skip


def everything(study: Study, task: Task) -> list[Job]:
    return [
        tuning(task, variant, rate, seed)
        for variant in study.variants for rate in task.rates for seed in COUNTEREXAMPLE_SEEDS
    ]  # fmt: skip


COUNTEREXAMPLES = "counterexamples"
# Each round needs the results of those before it.
ROUNDS: dict[str, Callable[[Study, Task], list[Job]]] = {
    "screening": screening,
    "run-off": run_off,
    "finals": finals,
    "controls": controls,
    COUNTEREXAMPLES: everything,
    "tuning of controls": tuning_of_controls,
    "tuned controls": tuned_controls,
}
CONTROLS = ("controls", "tuning of controls", "tuned controls")
