"""One run: a task, an optimizer, a learning rate and a seed give a curve of losses."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from alphaadam_dist.optimizer import AlphaOptimizer

from . import counterexamples, tasks
from .tasks import Scale
from .trial import Task, with_bf16_parameters
from .variants import BY_NAME

WARMUP = 0.1


@dataclass(frozen=True)
class Job:
    """What tells one run from another.

    ``evaluations`` is how often the held-out loss is measured, the last time at the end;
    ``embedding`` multiplies the learning rate of the input embedding; ``clip`` False leaves the task's clipping out;
    ``length`` multiplies the task's steps.
    """

    task: str
    variant: str
    lr: float
    seed: int
    embedding: float = 1.0
    clip: bool = True
    length: int = 1
    evaluations: int = 1


@dataclass(frozen=True)
class Result:
    """Losses as (step, loss), the last one at the end of training; inf where the run diverged."""

    job: Job
    curve: list[tuple[int, float]]
    alpha_mean: float | None = None
    alpha_peak: float | None = None

    @property
    def final(self) -> float:
        return self.curve[-1][1]


def all_tasks(scale: Scale) -> dict[str, Task]:
    return {task.name: task for task in (*tasks.tasks(scale), *counterexamples.TASKS)}


def run(scale: Scale, job: Job) -> Result:
    """Train once. The result depends on the job, the scale and the versions of what is installed, on nothing else."""
    task, variant = all_tasks(scale)[job.task], BY_NAME[job.variant]
    steps = task.steps * job.length
    start = task.start(job.seed)
    if variant.bf16_parameters:
        start = with_bf16_parameters(start)
    groups = [{"params": start.other, "scale": 1.0}]
    if start.embedding:
        groups.append({"params": start.embedding, "scale": job.embedding})
    optimizer = variant.build(groups, job.lr, steps=steps, seed=job.seed)
    schedule = LambdaLR(optimizer, functools.partial(warmup_and_cosine, steps))
    measured = {round(steps * (i + 1) / job.evaluations) for i in range(job.evaluations)}
    curve: list[tuple[int, float]] = []
    alphas: list[float] = []
    for step in range(steps):
        start.loss(step).backward()
        if job.clip and task.clip is not None:
            clip_grad_norm_([*start.other, *(start.embedding or [])], task.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if start.project is not None:
            start.project()
        if isinstance(optimizer, AlphaOptimizer):
            alpha = optimizer.metrics()["alpha"]
            assert alpha is not None
            alphas.append(alpha)
        if step + 1 in measured:
            loss = start.evaluate()
            curve.append((step + 1, loss if math.isfinite(loss) else math.inf))
            if not math.isfinite(loss):
                break
    return Result(job, curve, sum(alphas) / len(alphas) if alphas else None, max(alphas, default=None))


def warmup_and_cosine(steps: int, step: int) -> float:
    """The factor on the learning rate: linear to 1 over the first tenth, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
