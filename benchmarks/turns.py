"""Measuring side by side: contestants take turns on the same tensors, and a number is a ratio within one round.

Needs torch and nothing else, so that a bare GPU machine has it too.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

FUSED, CLIPPED = "AdamW fused", "clip_grad_norm_ + AdamW fused"


@dataclass(frozen=True)
class Row:
    """One contestant in one case: the median, and the ratio to ``against`` round by round."""

    case: str
    name: str
    milliseconds: float
    against: str
    ratio: float
    spread: tuple[float, float]  # the middle half of the ratios
    gigabytes_per_second: float | None = None  # of the traffic that the algorithm needs
    share_of_copy: float | None = None
    bar: float | None = None


Steps = dict[str, Callable[[], Any]]

BYTES = {"exact": 36, "delayed": 28, "clip_norm": 36, "bf16, delayed": 14}
"""Traffic an element in fp32: AdamW reads p, g, m, v and writes p, m, v; counting reads g and m."""


class Shared:
    """One parameter of fp32 with gradient and moments, which all optimizers that are measured step."""

    def __init__(self, elements: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.param = nn.Parameter(torch.randn(elements, generator=generator, device=device))
        self.param.grad = torch.randn(elements, generator=generator, device=device)
        self.first, self.second = torch.zeros_like(self.param), torch.zeros_like(self.param)

    def step_of(self, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        """Its ``step``, on these moments."""
        state = optimizer.state[self.param]
        on_device = isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])
        state["step"] = torch.ones((), device=self.param.device if on_device else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = self.first, self.second
        return optimizer.step

    def peers(self) -> Steps:
        """Fused AdamW, alone and after clipping."""
        fused = self.step_of(torch.optim.AdamW([self.param], fused=True))

        def clipped() -> None:
            nn.utils.clip_grad_norm_([self.param], 1.0, foreach=True)
            fused()

        return {FUSED: fused, CLIPPED: clipped}


def take_turns(
    steps: Steps, rounds: int, device: torch.device, before: Mapping[str, Callable[[], Any]] | None = None
) -> dict[str, list[float]]:
    """Seconds of every step, round by round, after one round that is not counted.

    The order is drawn anew for each round, because a step pays for what the one before it leaves: garbage to collect
    and cold caches. ``before`` has what runs ahead of a step, and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    for round_ in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            if before is not None:
                before[name]()
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def compare(case: str, name: str, seconds: dict[str, list[float]], against: str, bar: float | None = None) -> Row:
    ratios = sorted(mine / theirs for mine, theirs in zip(seconds[name], seconds[against], strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return Row(case, name, 1e3 * statistics.median(seconds[name]), against, statistics.median(ratios), (low, high),
               bar=bar)  # fmt: skip


def machine(device: torch.device) -> dict[str, str]:
    """Where the numbers come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    where = model if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"machine": where, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
