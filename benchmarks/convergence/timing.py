"""What a step costs: CPU time of one thread, apart from the sweep, whose own clock depends on what else runs."""

from __future__ import annotations

import statistics
import time
from typing import Any

from .tasks import Scale, tasks
from .trial import Task
from .variants import VARIANTS, Variant

WARM, MEASURED = 3, 15


def step_times(scale: Scale) -> dict[str, dict[str, tuple[float, float]]]:
    """task -> optimizer -> median milliseconds of (forward and backward, optimizer step). On the CPU."""
    return {task.name: {v.name: _measure(task, v) for v in VARIANTS} for task in tasks(scale)}


def _measure(task: Task, variant: Variant) -> tuple[float, float]:
    start = task.start(0)
    groups: list[dict[str, Any]] = [{"params": start.other, "scale": 1.0}, {"params": start.embedding, "scale": 1.0}]
    optimizer = variant.build(groups, 1e-3 * variant.lr_scale, steps=task.steps, seed=0)
    times: list[tuple[float, float]] = []
    for step in range(WARM + MEASURED):
        begin = time.process_time()
        start.loss(step).backward()
        middle = time.process_time()
        optimizer.step()
        optimizer.zero_grad()
        times.append((1e3 * (middle - begin), 1e3 * (time.process_time() - middle)))
    model, update = zip(*times[WARM:], strict=True)
    return statistics.median(model), statistics.median(update)
