"""What a step costs, apart from the sweep, whose own clock depends on what else runs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from .protocol import Study
from .trial import Task
from .variants import Variant

WARM, MEASURED = 3, 15


def step_times(study: Study) -> dict[str, dict[str, tuple[float, float]]]:
    """task -> optimizer -> median milliseconds of (forward and backward, optimizer step)."""
    return {task.name: {v.name: _measure(task, v) for v in study.variants} for task in study.tasks}


def _measure(task: Task, variant: Variant) -> tuple[float, float]:
    start = task.start(0)
    groups: list[dict[str, Any]] = [{"params": start.other, "scale": 1.0}, {"params": start.embedding, "scale": 1.0}]
    device = start.other[0].device
    optimizer = variant.build(groups, 1e-3 * variant.lr_scale, steps=task.steps, seed=0)
    times: list[tuple[float, float]] = []
    for step in range(WARM + MEASURED):
        begin = _now(device)
        start.loss(step).backward()
        middle = _now(device)
        optimizer.step()
        optimizer.zero_grad()
        times.append((1e3 * (middle - begin), 1e3 * (_now(device) - middle)))
    model, update = zip(*times[WARM:], strict=True)
    return statistics.median(model), statistics.median(update)


def _now(device: torch.device) -> float:
    """Seconds: CPU time, which other processes do not lengthen; with a GPU the time until it has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()
