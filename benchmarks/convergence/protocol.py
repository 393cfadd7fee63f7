"""The protocol: what is compared on what, in which order, and from where each search goes out.

1. **tuning**: for every optimizer in every case (task, size, length) the search of ``search.py`` over its axes, on two
   seeds. It goes out from its own best setting in the next smaller case, or else from that of the optimizer that it
   varies. Only AdamW in the smallest case begins at a rate that a person chose.
2. **finals**: every optimizer at its best setting, on eight seeds that tuning did not use.

The counterexamples have no tuning: every optimizer at every rate, three seeds, and all of it is shown.

**What it takes**, measured on 2026-11-27 on two cores. An optimizer in a case is 20 to 90 runs, by its axes; 15 where
its rate alone is tuned. By the seconds of their runs, on two processes, SHORT is 2400 runs in 21 minutes and LONG 6400
in 4.7 hours. A run of 128 steps takes 1.5 s, of 2048 steps 22 s, and the longest, 1.6M parameters for 2048 steps, two
minutes: that case, whose rate is tuned on one seed, is a third of LONG.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from . import counterexamples
from .runs import Job, Result
from .search import search
from .tasks import Scale
from .trial import Setting, Task
from .variants import ADAMW, ALPHAADAM, BY_NAME, CORE, LOOKAHEAD, NADAMW, OPTIONS, PEERS, TRIALS, VARIANTS, Variant

SMALL = Scale(64, 2, 4, block=64, batch=8, steps=128, vocabulary=512, rate=6, fine_tuning_rate=4)
LARGE_SCALE = Scale(
    768, 12, 12, block=512, batch=32, steps=1000, vocabulary=32000, rate=-2, fine_tuning_rate=-10,
    pretrained="HuggingFaceTB/SmolLM2-135M", encoder="sentence-transformers/all-MiniLM-L6-v2",
    glue="launch/data/reviews", device="cuda", autocast=True,
)  # fmt: skip

TASKS, SCRATCH = ("gpt", "llama", "finetune", "encoder"), ("gpt", "llama")
Done = Mapping[Job, Result]


@dataclass(frozen=True)
class Seeds:
    """Those that tuning uses, and those of the finals, which it does not."""

    tuning: tuple[int, ...] = (11, 12)
    finals: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)


class Missing(LookupError):
    """Results that are not there yet."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        super().__init__()
        self.jobs = list(jobs)


@dataclass(frozen=True)
class Case:
    """A task at a size and a length, both multiples, and how it is trained.

    ``fixed`` are axes that are not tuned, ``tuned_on`` is how many of the seeds for tuning are used, None for all. A
    control, whose clipping is left out or whose embedding has the rate of the others, goes out from the best setting
    of the case itself.
    """

    task: str
    size: int = 1
    length: int = 1
    clip: bool = True
    fixed: tuple[str, ...] = ()
    tuned_on: int | None = None

    @property
    def before(self) -> Case | None:
        """The case from whose best setting the search goes out."""
        if not self.clip or self.fixed == EMBEDDING:
            return replace(self, clip=True, fixed=())
        if self.size > 1:  # as many tokens a parameter
            return Case(self.task, self.size // 4, self.length // 4)
        return Case(self.task, length=self.length // 4) if self.length > 1 else None


EMBEDDING = ("embedding",)
# Sixteen times the steps or parameters keep what a quarter of them was tuned to and have their rate tuned anew.
ALL_BUT_RATE = ("beta1", "embedding", "lookahead", "gamma")


@dataclass(frozen=True)
class Stage:
    """Some optimizers in some cases. ``against``: whose differences to whom the report shows."""

    title: str
    cases: tuple[Case, ...]
    variants: tuple[Variant, ...]
    against: tuple[str, ...] = (ADAMW,)


CONTROLLED = tuple(BY_NAME[name] for name in (ADAMW, ALPHAADAM, LOOKAHEAD))
FOUR = Stage("Four times the steps", tuple(Case(task, length=4) for task in TASKS), CORE, (ADAMW, ALPHAADAM, LOOKAHEAD))
TRIED = Stage(
    "Inside the frame, four times the steps", tuple(Case(task, length=4) for task in SCRATCH),
    (BY_NAME[ADAMW], BY_NAME[ALPHAADAM], BY_NAME[LOOKAHEAD], *TRIALS), (LOOKAHEAD, ALPHAADAM),
)  # fmt: skip
ONE = Stage("Short runs", tuple(Case(task) for task in TASKS), CORE, (ADAMW, ALPHAADAM, LOOKAHEAD))
BOTH_BASES = (BY_NAME[ADAMW], BY_NAME[ALPHAADAM])
ITS_OPTIONS = Stage("Short runs: AlphaAdam's options", ONE.cases, (*BOTH_BASES, *OPTIONS), (ADAMW, ALPHAADAM))
OTHERS = Stage("Short runs: peers", ONE.cases, (*BOTH_BASES, *PEERS), (ADAMW, ALPHAADAM))
SIXTEEN = Stage("Sixteen times the steps", tuple(Case(task, length=16, fixed=ALL_BUT_RATE) for task in SCRATCH), CORE)
SIZES = Stage(
    "Larger models, as many tokens a parameter",
    (Case("llama", size=4, length=4), Case("llama", size=16, length=16, fixed=ALL_BUT_RATE, tuned_on=1)),
    CORE,
)
SLOW = Stage(
    "The embedding at the rate of the others", tuple(Case(task, fixed=EMBEDDING) for task in TASKS), CONTROLLED
)
UNCLIPPED = Stage("No clipping", tuple(Case(task, clip=False) for task in TASKS), CONTROLLED)

SHORT = (ONE, ITS_OPTIONS, SLOW)
LONG = (FOUR, ONE, SIXTEEN, TRIED, ITS_OPTIONS, SLOW, UNCLIPPED, OTHERS, SIZES)
"""In the order in which they are run: what the defaults depend on comes first, what takes longest last."""
# One seed tunes the rate, three judge: a unit is one run, and each finished optimizer is a row.
LARGE = (
    Stage(
        "Models of 100M parameters", tuple(Case(task, fixed=ALL_BUT_RATE) for task in ("gpt", "finetune", "encoder")),
        tuple(BY_NAME[name] for name in (ADAMW, LOOKAHEAD, ALPHAADAM, NADAMW)), (ADAMW,),
    ),
)  # fmt: skip
LARGE_SEEDS = Seeds((11,), (1, 2, 3))
COUNTEREXAMPLE_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Study:
    """What is compared, and the results so far, which grow while it runs."""

    tasks: Mapping[str, Task]
    stages: tuple[Stage, ...]
    seeds: Seeds
    done: Done
    counterexamples: tuple[Task, ...] = counterexamples.TASKS

    def title(self, case: Case) -> str:
        return self.tasks[case.task].title

    def best(self, case: Case, variant: Variant) -> Setting:
        """What the search ends at. Raises Missing."""
        axes = [axis for axis in variant.axes if axis not in case.fixed]
        return search(self._start(case, variant), axes, lambda settings: self._losses(case, variant, settings))

    def _start(self, case: Case, variant: Variant) -> Setting:
        if case.before is not None:
            found = self.best(case.before, variant)
            return replace(found, embedding=0) if case.fixed == EMBEDDING else found
        if variant.name == variant.start:
            return Setting(self.tasks[case.task].rate)
        return replace(self.best(case, BY_NAME[variant.start]), **variant.begin)  # type: ignore[arg-type]

    def _losses(self, case: Case, variant: Variant, settings: list[Setting]) -> list[float]:
        """The mean loss of each setting over the tuning seeds."""
        seeds = self.seeds.tuning[: case.tuned_on]
        jobs = [[job(case, variant, setting, seed) for seed in seeds] for setting in settings]
        self._known([one for of_one in jobs for one in of_one])
        return [fmean(self.done[one].final for one in of_one) for of_one in jobs]

    def finals(self, case: Case, variant: Variant) -> list[Result]:
        """The finals in the order of their seeds. Raises Missing."""
        setting = self.best(case, variant)
        jobs = [job(case, variant, setting, seed) for seed in self.seeds.finals]
        return self._known(jobs)

    def has(self, case: Case, variant: Variant) -> bool:
        """Whether the finals are there."""
        try:
            return bool(self.finals(case, variant))
        except Missing:
            return False

    def ends(self, task: Task, variant: Variant, rate: int) -> list[Result]:
        """A counterexample's runs at a rate. Raises Missing."""
        return self._known([Job(task.name, variant.name, untuned(variant, rate), s) for s in COUNTEREXAMPLE_SEEDS])

    def cells(self) -> list[tuple[Case, Variant]]:
        """Each optimizer in each case, once, in the order in which they are run."""
        names = dict.fromkeys((c, v.name) for stage in self.stages for c in stage.cases for v in stage.variants)
        return [(case, BY_NAME[name]) for case, name in names]

    def _known(self, jobs: list[Job]) -> list[Result]:
        missing = [one for one in jobs if one not in self.done]
        if missing:
            raise Missing(missing)
        return [self.done[one] for one in jobs]


def job(case: Case, variant: Variant, setting: Setting, seed: int) -> Job:
    return Job(case.task, variant.name, setting, seed, case.size, case.length, case.clip)


def untuned(variant: Variant, rate: int) -> Setting:
    """Where the search begins, at this rate."""
    before = Setting(rate) if variant.name == variant.start else untuned(BY_NAME[variant.start], rate)
    return replace(before, **variant.begin)  # type: ignore[arg-type]


def wanted(study: Study, finished: set[tuple[str, ...]]) -> Iterator[Job]:
    """The runs that can be made now, in the order of the stages. What is finished is added to ``finished``."""
    wants: dict[tuple[str, ...], Callable[[], object]] = {}
    for case, variant in study.cells():
        wants[(repr(case), variant.name)] = functools.partial(study.finals, case, variant)
    for task in study.counterexamples:
        for variant in VARIANTS:
            for rate in counterexamples.RATES[task.name]:
                wants[(task.name, variant.name, str(rate))] = functools.partial(study.ends, task, variant, rate)
    for name, ask in wants.items():
        if name not in finished:
            try:
                ask()
                finished.add(name)
            except Missing as missing:
                yield from missing.jobs
