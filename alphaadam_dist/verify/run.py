"""Trains the Llama in one process and under every sharding, and compares.

A row passes where the sharding is what one process is on the same kernels, and where one process is on them what it is
on the reference. The model is one for which users get the fast kernels.

Every rank trains on the same batches: averaging equal gradients changes no more than a last bit, so what differs comes
from the sharding. Tensor parallelism splits the sums behind a gradient, as does a world that is no power of two its
average, and kernels differ in last bits too; then rounding may turn the sign of a gradient that is all but zero, and
with it a step of one coordinate.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kernels
from ..optimizer import AlphaOptimizer
from . import shardings, zero
from .collectives import Collectives
from .experts import mixtral
from .model import InBfloat16, Llama, token_batches
from .settings import ADAMW, REFERENCE, Setting
from .trainee import Trainee, of_module

SCALES = (1.0, 4.0, 0.25, 2.0, 0.5)
"""Of each step's loss, so that clipping cuts some gradients, by different factors, and spares others."""
STEPS, BATCH = len(SCALES), 8
COUNTED = 1
"""The step whose collectives are counted, which takes time. The one before builds the layout, those after are timed."""
WIDTH, SMALL_WIDTH = 256, 32
"""Of the Llama: with more parameters than the ``kernels.SMALL`` below which nothing is fast, and with few."""


@dataclass(frozen=True)
class Bar:
    """What rounding may change: ``counts`` as a share of the evidence, parameters by a ``deviation``."""

    deviation: float
    counts: float

    def beyond(self, adamw_deviation: float) -> Bar:
        return replace(self, deviation=self.deviation + 10 * adamw_deviation)


BARS = {False: Bar(1e-2, 1e-4), True: Bar(5e-2, 2e-3)}
"""In fp32 and in bf16. What was measured, on 1 to 4 ranks: 2e-3 and 2e-5 in fp32; in bf16 1e-6 and none, but 2e-2 and
4e-4 on 3 ranks, where averaging equal gradients rounds."""


@dataclass
class Trained:
    """What a run of STEPS steps was: whole parameters on the CPU, what the optimizer reported, what a step cost."""

    params: dict[str, Tensor]
    alphas: list[Any]
    counts: list[tuple[float, float]]
    collectives: Counter[tuple[str, int]]
    seconds: float


@dataclass
class Row:
    """One line of the table; ``problems`` says why it failed."""

    sharding: str
    setting: str
    deviation: float = float("nan")
    adamw_deviation: float = float("nan")
    collectives: int = 0
    bytes: int = 0
    seconds: float = 0.0
    adamw_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def train(trainee: Trainee, device: torch.device) -> Trained:
    """STEPS steps on batches that are the same on every rank."""
    optimizer = trainee.optimizer
    alphas, counts, seconds = [], [], 0.0
    counted = Collectives()
    for i, (batch, scale) in enumerate(zip(token_batches(STEPS, BATCH).to(device), SCALES, strict=True)):
        trainee.backward(batch, scale)
        start = time.perf_counter()
        with counted if i == COUNTED else nullcontext():
            trainee.step()
        if isinstance(optimizer, AlphaOptimizer):
            alphas.append(optimizer.alpha)  # synchronises, so the clock is right on a GPU too
            counts.append((optimizer.agreement["agree"], optimizer.agreement["conflict"]))
        elif device.type != "cpu":
            torch.accelerator.synchronize()
        seconds += time.perf_counter() - start if i > COUNTED else 0.0
    return Trained(dict(trainee.full_parameters()), alphas, counts, counted.seen, seconds / (STEPS - COUNTED - 1))


@dataclass(frozen=True)
class Start:
    """A sharding to try.

    Attributes:
        train: trains with a setting, on the fast kernels or not.
        steps_on: the device whose kernels step.
        bf16: the model is in bf16, and a small one: many CPUs take long to multiply in bf16.
        experts: the model has experts.
    """

    settings: Sequence[Setting]
    train: Callable[[Setting, bool], Trained]
    steps_on: torch.device
    bf16: bool = False
    experts: bool = False


def llama(device: torch.device, *, bf16: bool = False, experts: bool = False) -> Llama:
    """What is trained."""
    width = SMALL_WIDTH if bf16 else WIDTH
    return (mixtral(width) if experts else Llama(width=width)).to(device)


def under(sharding: shardings.Sharding, device: torch.device) -> Start:
    def start(setting: Setting, fast: bool) -> Trained:
        model = sharding.shard(llama(device, experts=sharding.experts), device)
        optimizer = setting.optimizer(model.named_parameters(), fast, **sharding.options())
        return train(sharding.trainee(model, optimizer), device)

    return Start(sharding.settings, start, device, experts=sharding.experts)


def under_zero(kind: zero.Zero, device: torch.device) -> Start:
    def start(setting: Setting, fast: bool) -> Trained:
        model = llama(device, bf16=kind.bf16, experts=kind.experts)
        with kind.trainee(model, setting, BATCH, fast) as trainee:
            return train(trainee, device)

    return Start(kind.settings, start, torch.device("cpu") if kind.offload else device, kind.bf16, kind.experts)


def of_deepspeed() -> tuple[zero.Zero, ...]:
    """What is tried of it, where it can be imported: what leaves traces in the process comes last."""
    from . import parallel

    return (*zero.KINDS, *parallel.KINDS)


def starts(device: torch.device) -> dict[str, Start]:
    """Every sharding that can be tried here. Collective."""
    world = dist.get_world_size()
    found = {s.name: under(s, device) for s in shardings.SHARDINGS if s.possible(world)}
    if _on_any_rank(zero.problem()) is None:
        found |= {kind.name: under_zero(kind, device) for kind in of_deepspeed() if kind.possible(world) is None}
    return found


def left_out(device: torch.device) -> list[str]:
    """What ``starts`` has not and what ``rows`` will not use, and why. Collective."""
    world = dist.get_world_size()
    missing = [f"{s.name} (not on {world} ranks)" for s in shardings.SHARDINGS if not s.possible(world)]
    problem = _on_any_rank(zero.problem())
    if problem is not None:
        missing.append(f"ZeRO ({problem})")
    else:
        missing += [f"{kind.name} ({kind.possible(world)})" for kind in of_deepspeed() if kind.possible(world)]
    if device.type == "cpu":
        missing.append("context parallel (torch has no causal ring attention on a CPU)")
    for steps_on in dict.fromkeys(start.steps_on for start in starts(device).values()):
        problem = no_fast_kernels(steps_on)
        missing += [f"the fast kernels on {steps_on.type} ({problem})"] if problem else []
    return missing


def no_fast_kernels(device: torch.device) -> str | None:
    """Why some rank has no fast kernels for a device; None where all have. Collective."""
    problem = None
    try:
        kernels.choose(True, device, 0)
    except ValueError as error:
        problem = str(error)
    return _on_any_rank(problem)


def _on_any_rank(problem: str | None) -> str | None:
    """The first rank's problem, the same on every rank. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None), None)


@dataclass
class Alone:
    """What one process on one kind of kernels makes of the parameters ``start``, and AdamW's."""

    start: dict[str, Tensor]
    trained: Trained

    def deviation(self, other: Trained) -> float:
        """L2 distance over the whole model, as a share of the way that this process went."""
        own = self.trained.params
        apart = sum(float((other.params[name].double() - own[name].double()).square().sum()) for name in own)
        gone = sum(float((own[name].double() - self.start[name].double()).square().sum()) for name in own)
        return (apart / gone) ** 0.5

    def differences(self, other: Trained, bar: Bar) -> list[str]:
        """What rounding does not explain."""
        found = []
        for step, (ours, theirs) in enumerate(zip(other.counts, self.trained.counts, strict=True)):
            if max(abs(ours[0] - theirs[0]), abs(ours[1] - theirs[1])) > bar.counts * sum(theirs):
                found.append(
                    f"step {step + 1} counted {ours[0]:.0f} and {ours[1]:.0f}, not {theirs[0]:.0f} and {theirs[1]:.0f}"
                )
                break
        deviation = self.deviation(other)
        if not deviation <= bar.deviation:
            found.append(f"parameters deviate by {deviation:.1e}, more than {bar.deviation:.1e}")
        return found


def alone(device: torch.device, setting: Setting, *, bf16: bool, experts: bool, fast: bool) -> Alone:
    """Train in one process: rank 0's, because ranks may share processors. Collective."""
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        bare = llama(device, bf16=bf16, experts=experts)
        model = InBfloat16(bare) if bf16 else bare
        start = dict(shardings.full_parameters(model))
        optimizer = setting.optimizer(model.named_parameters(), fast)
        result = [Alone(start, train(of_module(model, optimizer, shardings.full_parameters), device))]
    dist.broadcast_object_list(result)
    return result[0]


def rows(device: torch.device, chosen: Mapping[str, Start]) -> Iterator[Row]:
    """One row for every sharding and setting, the same on every rank. Collective.

    Where some rank has no fast kernels, all rows are on the reference, as training would be.
    """
    trained_alone = functools.cache(functools.partial(alone, device))
    for sharding, start in chosen.items():
        fast = no_fast_kernels(start.steps_on) is None
        one_process = functools.partial(trained_alone, bf16=start.bf16, experts=start.experts)
        tried = [setting for setting in start.settings if fast or setting is not REFERENCE]
        trained = {}
        try:
            for setting in (ADAMW, *tried):
                trained[setting] = start.train(setting, fast)
        except Exception as error:
            traceback.print_exc()
            yield _same_everywhere(Row(sharding, setting.name, problems=[f"{type(error).__name__}: {error}"]))
            continue
        adamw = trained.pop(ADAMW)
        adamw_deviation = one_process(ADAMW, fast=False).deviation(adamw)
        bar = BARS[start.bf16].beyond(adamw_deviation)
        for setting, ours in trained.items():
            theirs = one_process(setting, fast=fast)
            row = Row(sharding, setting.name, theirs.deviation(ours), adamw_deviation)
            row.seconds, row.adamw_seconds = ours.seconds, adamw.seconds
            row.problems = _disagreements(ours) + theirs.differences(ours, bar)
            reference = one_process(setting, fast=False)
            unlike = reference.differences(theirs.trained, BARS[start.bf16])
            row.problems += [f"one process on the fast kernels against the reference: {problem}" for problem in unlike]
            _judge_collectives(row, ours.collectives - adamw.collectives, setting.collectives)
            yield _same_everywhere(row)


def _disagreements(trained: Trained) -> list[str]:
    """Which ranks reported something else than rank 0. Collective."""
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (trained.alphas, trained.counts))
    found = []
    for what, index in (("alpha", 0), ("counts", 1)):
        wrong = [rank for rank, report in enumerate(reports) if report[index] != reports[0][index]]
        if wrong:
            found.append(f"{what} on rank {wrong[0]} not those of rank 0")
    return found


def _judge_collectives(row: Row, extra: Counter[tuple[str, int]], allowed: int) -> None:
    row.collectives = extra.total()
    row.bytes = sum(size * count for (_, size), count in extra.items())
    if row.collectives > allowed:
        row.problems.append(f"{row.collectives} collectives a step more than AdamW's")


def _same_everywhere(row: Row) -> Row:
    """Rank 0's row, with the problems of all ranks."""
    all_rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_rows, row)
    result: Row = all_rows[0]
    result.problems = list(dict.fromkeys(problem for each in all_rows for problem in each.problems))
    return result
