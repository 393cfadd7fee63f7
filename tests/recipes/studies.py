"""A study whose losses are imagined, and one small enough to be trained in a blink."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import ClassVar

from benchmarks.convergence import protocol, tasks
from benchmarks.convergence.protocol import Seeds, Stage, Study
from benchmarks.convergence.runs import Job, Result
from benchmarks.convergence.variants import ALPHAADAM, BOTH, LOOKAHEAD

TINY = replace(protocol.SMALL, width=16, layers=1, heads=2, block=16, batch=2, steps=8, vocabulary=300)


class Imagined(dict[Job, Result]):
    """A loss for every job that is asked for: a valley in rate, embedding and beta1, and each optimizer's own gain."""

    GAINS: ClassVar = {ALPHAADAM: 0.1, LOOKAHEAD: 0.2, BOTH: 0.25}

    def __contains__(self, job: object) -> bool:
        return True

    def __missing__(self, job: Job) -> Result:
        at = job.setting
        far = (at.rate - 5 - job.length // 4) ** 2 + (at.embedding - 2) ** 2 + 10 * abs(at.beta1 - 0.95)
        noise = random.Random(job.seed).random() / 10
        loss = 3 + far / 100 + noise - self.GAINS.get(job.variant, 0) / job.length
        alpha = 1.5 if job.variant == ALPHAADAM else None
        result = self[job] = Result(job, [loss - 0.1, loss + 0.1], alpha, alpha, 2.0)
        return result


def imagined(scale: tasks.Scale = TINY, stages: tuple[Stage, ...] = protocol.LONG) -> Study:
    return Study({task.name: task for task in tasks.tasks(scale)}, stages, Seeds(), Imagined())
