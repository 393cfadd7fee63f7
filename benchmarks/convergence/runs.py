"""One run: a task, an optimizer, its setting and a seed give a held-out loss."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from alphaadam_dist.optimizer import AlphaOptimizer
from benchmarks import baselines

from . import counterexamples, tasks
from .tasks import Scale
from .trial import Setting, Task, Trial, warmup_and_cosine, with_bf16_parameters
from .variants import BY_NAME, MATCHED, Variant

BETA2 = 0.95
"""As language models are trained."""
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Job:
    """What tells one run from another.

    ``size`` multiplies the parameters inside the layers, ``length`` the task's steps; ``clip`` False leaves the task's
    clipping out.
    """

    task: str
    variant: str
    setting: Setting
    seed: int
    size: int = 1
    length: int = 1
    clip: bool = True


@dataclass(frozen=True)
class Result:
    """``documents``: the losses at the end, one for each held-out document; empty where the run diverged."""

    job: Job
    documents: list[float]
    alpha_mean: float | None = None
    alpha_peak: float | None = None
    seconds: float = 0.0

    @property
    def final(self) -> float:
        """The mean over the documents, infinite where the run diverged."""
        return fmean(self.documents) if self.documents else math.inf


def all_tasks(scale: Scale) -> dict[str, Task]:
    return {task.name: task for task in (*tasks.tasks(scale), *counterexamples.TASKS)}


def run(scale: Scale, job: Job) -> Result:
    """Train once. But for the seconds it took, the result depends on job, scale and installed versions alone."""
    begin = time.perf_counter()
    task, variant = all_tasks(scale.times(job.size))[job.task], BY_NAME[job.variant]
    steps = task.steps * job.length
    start = task.start(job.seed)
    if variant.bf16_parameters:
        start = with_bf16_parameters(start)
    groups = parameter_groups(start, 2.0**job.setting.embedding)
    optimizer = build(variant, groups, job.setting, steps=steps, seed=job.seed)
    schedule = LambdaLR(optimizer, functools.partial(warmup_and_cosine, steps))
    alphas: list[float] = []
    for step in range(steps):
        start.loss(step).backward()
        if job.clip and task.clip is not None:
            clip_grad_norm_([param for group in groups for param in group["params"]], task.clip)
        if variant.ramp is not None and isinstance(optimizer, baselines.LookAhead):
            at_begin, at_end = variant.ramp
            optimizer.lookahead = job.setting.lookahead * (at_begin + step / steps * (at_end - at_begin))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if start.project is not None:
            start.project()
        if isinstance(optimizer, AlphaOptimizer):
            alpha = optimizer.metrics()["alpha"]
            assert alpha is not None
            alphas.append(alpha)
    documents = [round(loss, 5) for loss in start.evaluate()]
    if not all(map(math.isfinite, documents)):
        documents = []
    mean = fmean(alphas) if alphas else None
    return Result(job, documents, mean, max(alphas, default=None), round(time.perf_counter() - begin, 2))


def parameter_groups(trial: Trial, embedding: float) -> list[dict[str, Any]]:
    """Matrices, the input embedding with its own scale, and norms and biases, which do not decay."""
    matrices = [param for param in trial.other if param.ndim > 1]
    rest = [param for param in trial.other if param.ndim <= 1]
    groups = [
        {"params": matrices, "scale": 1.0, "decays": True},
        {"params": trial.embedding or [], "scale": embedding, "decays": True},
        {"params": rest, "scale": 1.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def build(variant: Variant, groups: list[dict[str, Any]], setting: Setting, *, steps: int, seed: int) -> Optimizer:
    """The optimizer over :func:`parameter_groups`. A scale leaves its group's decay, rate * weight_decay, alone."""
    options = dict(variant.options)
    options["betas"] = (setting.beta1, options.pop("beta2", BETA2))
    if "warmup" in options:
        options["alpha_warmup"] = round(options.pop("warmup") * steps)
    if options.get("threshold") == MATCHED:
        options["threshold"] = (1 - setting.beta1) / setting.beta1
    if variant.optimizer is baselines.RandomMask:
        options["seed"] = seed
    options |= {axis: getattr(setting, axis) for axis in ("lookahead", "gamma") if axis in variant.axes}
    lr = setting.lr * variant.lr_scale
    made = [
        {
            "params": group["params"],
            "lr": lr * group["scale"],
            "weight_decay": WEIGHT_DECAY / variant.lr_scale / group["scale"] if group["decays"] else 0.0,
        }
        for group in groups
    ]
    return variant.optimizer(made, lr=lr, **options)
