"""Trains the Llama in one process and under every sharding, and compares.

Every rank trains on the same batches: averaging equal gradients changes no more than a last bit, so what differs comes
from the sharding. Tensor parallelism splits the sums behind a gradient, as does a world that is no power of two its
average; then rounding may turn the sign of a gradient that is all but zero, and with it a step of one coordinate.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..alphaadam import AlphaAdam
from . import shardings, zero
from .collectives import Collectives
from .model import Llama, next_token_loss, token_batches

STEPS, BATCH, LR = 10, 8, 1e-3
SETTINGS: dict[str, dict[str, Any]] = {"exact": {}, "delayed": {"sync": "delayed"}, "layer": {"scope": "layer"}}

DEVIATION_BAR = 1e-4
"""Relative L2 over the model, beyond ten times AdamW's. A sign that rounding turned costs 1e-5 to 3e-5 here, alphas of
each rank's own 1e-3."""
COUNTS_BAR = 1e-3
"""Share of the evidence by which counts may differ from one process's: such signs are one in 10,000, or none."""


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
    collectives: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    adamw_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    full_parameters: Callable[[Any], Iterable[tuple[str, Tensor]]],
) -> Trained:
    """``model`` is a module, or a DeepSpeed engine, which steps its optimizer itself."""
    is_engine = hasattr(model, "backward")
    alphas, counts, seconds = [], [], 0.0
    counted = Collectives()
    for i, batch in enumerate(token_batches(STEPS, BATCH).to(device)):
        loss = next_token_loss(model(batch), batch)
        (model.backward if is_engine else torch.Tensor.backward)(loss)
        start = time.perf_counter()
        if i == 0:  # it builds the layout, once
            (model if is_engine else optimizer).step()
        else:
            with counted:
                (model if is_engine else optimizer).step()
        if isinstance(optimizer, AlphaAdam):
            alphas.append(optimizer.alpha)  # synchronises, so the clock is right on a GPU too
            counts.append((optimizer.agreement["agree"], optimizer.agreement["conflict"]))
        elif device.type != "cpu":
            torch.accelerator.synchronize()
        seconds += 0.0 if i == 0 else time.perf_counter() - start
        optimizer.zero_grad()
    return Trained(dict(full_parameters(model)), alphas, counts, counted.seen, seconds / (STEPS - 1))


def deviation(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 distance over the whole model."""
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return (difference / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5


Start = Callable[[dict[str, Any] | None], Trained]
"""Trains with AlphaAdam's options, or with AdamW where they are None."""


def _optimizer(named: Iterable[tuple[str, Tensor]], options: dict[str, Any] | None) -> torch.optim.Optimizer:
    if options is None:
        return torch.optim.AdamW(named, lr=LR, foreach=False)
    return AlphaAdam(named, lr=LR, **options)


def alone(device: torch.device) -> Start:
    def start(options: dict[str, Any] | None) -> Trained:
        model = Llama().to(device)
        return train(model, _optimizer(model.named_parameters(), options), device, shardings.full_parameters)

    return start


def under(sharding: shardings.Sharding, device: torch.device) -> Start:
    def start(options: dict[str, Any] | None) -> Trained:
        model = sharding.shard(Llama().to(device), device)
        options = None if options is None else {**options, **sharding.options()}
        return train(model, _optimizer(model.named_parameters(), options), device, shardings.full_parameters)

    return start


def under_zero(stage: int, device: torch.device) -> Start:
    def start(options: dict[str, Any] | None) -> Trained:
        model = Llama().to(device)
        optimizer = _optimizer(model.named_parameters(), options)
        engine = zero.engine(model, optimizer, stage, BATCH)
        trained = train(engine, optimizer, device, zero.full_parameters)
        engine.destroy()
        return trained

    return start


def starts(device: torch.device) -> dict[str, Start]:
    """Every sharding that this world allows."""
    world = dist.get_world_size()
    possible = {s.name: under(s, device) for s in shardings.SHARDINGS if s.possible(world)}
    stages = {f"ZeRO-{stage}": under_zero(stage, device) for stage in zero.STAGES} if zero.installed() else {}
    return {**possible, **stages}


def left_out() -> list[str]:
    """What ``starts`` has not, and why."""
    world = dist.get_world_size()
    missing = [f"{s.name} (not on {world} ranks)" for s in shardings.SHARDINGS if not s.possible(world)]
    return missing if zero.installed() else [*missing, "ZeRO (DeepSpeed is not installed)"]


def rows(device: torch.device, chosen: dict[str, Start]) -> Iterator[Row]:
    """One row for every sharding and setting, the same on every rank. Collective."""
    cases: dict[str, dict[str, Any] | None] = {**SETTINGS, "AdamW": None}
    expected = {name: alone(device)(options) for name, options in cases.items()}
    for sharding, start in chosen.items():
        try:
            trained = {name: start(options) for name, options in cases.items()}
        except Exception as error:
            row = Row(sharding, "all", problems=[f"{type(error).__name__}: {error}"])
            traceback.print_exc()
            yield _same_everywhere(row)
            continue
        adamw = trained["AdamW"]
        for name in SETTINGS:
            row = _compare(Row(sharding, name), trained[name], expected[name])
            row.adamw_deviation = deviation(adamw.params, expected["AdamW"].params)
            row.adamw_seconds = adamw.seconds
            _judge(row, trained[name].collectives - adamw.collectives)
            yield _same_everywhere(row)


def _compare(row: Row, trained: Trained, expected: Trained) -> Row:
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (trained.alphas, trained.counts))
    for what, index in (("alpha", 0), ("counts", 1)):
        wrong = [rank for rank, report in enumerate(reports) if report[index] != reports[0][index]]
        if wrong:
            row.problems.append(f"{what} on rank {wrong[0]} not those of rank 0")
    for step, (ours, theirs) in enumerate(zip(trained.counts, expected.counts, strict=True)):
        if max(abs(ours[0] - theirs[0]), abs(ours[1] - theirs[1])) > COUNTS_BAR * sum(theirs):
            row.problems.append(f"step {step + 1} counted {ours[0]:.0f} and {ours[1]:.0f}, one process "
                                f"{theirs[0]:.0f} and {theirs[1]:.0f}")  # fmt: skip
            break
    row.deviation, row.seconds = deviation(trained.params, expected.params), trained.seconds
    return row


def _judge(row: Row, extra: Counter[tuple[str, int]]) -> None:
    bar = DEVIATION_BAR + 10 * row.adamw_deviation
    if not row.deviation <= bar:
        row.problems.append(f"parameters deviate by {row.deviation:.1e}, more than {bar:.1e}")
    row.collectives = extra.total() / (STEPS - 1)
    row.bytes = sum(size * count for (_, size), count in extra.items()) / (STEPS - 1)
    if row.collectives > 1:
        row.problems.append(f"{row.collectives:g} collectives a step more than AdamW's")


def _same_everywhere(row: Row) -> Row:
    """Rank 0's row, with the problems of all ranks."""
    all_rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_rows, row)
    result: Row = all_rows[0]
    result.problems = list(dict.fromkeys(problem for each in all_rows for problem in each.problems))
    return result
