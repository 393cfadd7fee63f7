"""What a step costs: AlphaAdam in each mode beside AdamW and its peers, in one run, on the same tensors.

    alphaadam bench                         some minutes; `make bench` does the same
    alphaadam bench --size 32 --rounds 9

Contestants take turns, so that what disturbs the machine disturbs all of them; a number is the median over the rounds
of the ratio to the peer in the same round. All share one parameter, gradient and pair of moments, so memory is as warm
for one as for the other. small_tensors.py has the rows for lists of small tensors, offload.py those for ZeRO with the
optimizer on the CPU; then comes the memory that a step takes beyond what lies there anyway. At the end stands which
bars hold, and what moved since the last run.
"""

from __future__ import annotations

import datetime
import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from alphaadam_dist.training.plots import GREY, INK, STYLE
from benchmarks import baselines
from benchmarks.offload import OFFLOAD_PEER, offloaded
from benchmarks.report import beside_last, judge, show
from benchmarks.small_tensors import one_odd_tensor, small_tensors, start_up
from benchmarks.turns import BYTES, CLIPPED, FUSED, Row, Shared, Steps, compare, machine, take_turns

SIZES = (1, 4, 32, 256)  # Mi elements
SLOW = 32  # Mi elements above which eager peers are left out: they take seconds a step
DEFAULT = "AlphaAdam exact"
AXIS = 2.0
"""Of the picture, as a ratio to fused AdamW. It shows what a choice between these costs; slower ones are numbers."""
OURS_COLOR, PEERS_COLOR = "#d1495b", "#30638e"
RESULTS = Path(__file__).parent / "results"


COUNT, READ = "count alone", "torch.dot of gradient and momentum"  # the second only reads what the first does
BARS: dict[str, tuple[str, float | None]] = {
    "AlphaAdam delayed": (FUSED, 1.02), "AlphaAdam exact": (FUSED, 1.45), "AlphaAdam clip_norm": (CLIPPED, 0.95),
    "AlphaAdam bf16, delayed": (FUSED, 0.75), COUNT: (READ, None),
}  # fmt: skip
JUDGED = ("32 Mi", "256 Mi")
MOST_MEMORY = 1.0  # MB at the peak of a step above fused AdamW's
OURS: dict[str, dict[str, Any]] = {
    "exact": {},
    "delayed": {"sync": "delayed"},
    "clip_norm": {"clip_norm": 1.0},
    "layer": {"scope": "layer"},
    "threshold": {"threshold": 1 / 9},
    "threshold, delayed": {"threshold": 1 / 9, "sync": "delayed"},
    "threshold, clip_norm": {"threshold": 1 / 9, "clip_norm": 1.0},
    "gamma=1": {"gamma": 1.0},
    "gamma=1, look-ahead": {"gamma": 1.0, "lookahead": 0.25},
}


def contestants(elements: int, device: torch.device) -> tuple[Steps, Steps]:
    """Steps on one and the same parameter, gradient and moments: of the fast, and of those in eager torch."""
    shared = Shared(elements, device)
    param, first, second, step_of = shared.param, shared.first, shared.second, shared.step_of
    gradient = cast(Tensor, param.grad)
    steps = shared.peers()
    for name, options in OURS.items():
        steps[f"AlphaAdam {name}"] = step_of(AlphaAdam([param], fused=True, **options))
    half = nn.Parameter(param.detach().bfloat16())  # a state of its own, which the first step makes
    half.grad = torch.randn(elements, device=device).bfloat16()
    steps["AlphaAdam bf16, delayed"] = AlphaAdam([half], fused=True, state_dtype="bfloat16", sync="delayed").step
    eager = {
        "AlphaAdam reference kernels": step_of(AlphaAdam([param], fused=False)),
        "AdamW for-loop": step_of(torch.optim.AdamW([param], foreach=False)),
        "AdamW foreach": step_of(torch.optim.AdamW([param], foreach=True)),
        "C-AdamW": step_of(baselines.CAdamW([param])),
        "MGUP-AdamW": step_of(baselines.MGUPAdamW([param])),
    }
    if device.type == "cpu":
        steps[COUNT] = lambda: torch.ops.alphaadam.count([gradient], [first], 0.0, 1.0, False)
        steps[READ] = lambda: torch.dot(gradient, first)
    if device.type == "cpu" and (adam := _deepspeed_cpu_adam(param)) is not None:
        adam.state[param].update(step=1, exp_avg=first, exp_avg_sq=second)
        steps[OFFLOAD_PEER] = adam.step
    return steps, eager


def _deepspeed_cpu_adam(param: Tensor) -> Any:
    """None where DeepSpeed is not installed or cannot compile it."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam([param], adamw_mode=True)
    except Exception as error:
        warnings.warn(f"{OFFLOAD_PEER} is left out: {error}", stacklevel=2)
        return None


def flat_tensor(mebi: int, rounds: int, device: torch.device) -> list[Row]:
    """One flat parameter, as ZeRO has it."""
    elements = mebi * 2**20
    steps, eager = contestants(elements, device)
    source = torch.empty(4 * elements, device=device)
    target = torch.empty_like(source)
    steps["copy"] = lambda: target.copy_(source)
    # the eager ones apart: they take and free memory, and a step after them pays for it
    seconds = take_turns(steps, 2 * rounds, device)
    copied = 32 * elements / statistics.median(seconds.pop("copy"))
    rows = []
    for name in seconds:
        against, bar = BARS.get(name, (FUSED, None))
        row = compare(f"{mebi} Mi", name, seconds, against, bar if f"{mebi} Mi" in JUDGED else None)
        traffic = 28 if name == FUSED else BYTES.get(name.removeprefix("AlphaAdam "))
        if traffic is not None:
            speed = traffic * elements / (row.milliseconds / 1e3)
            row = Row(**{**asdict(row), "gigabytes_per_second": speed / 1e9, "share_of_copy": speed / copied})
        rows.append(row)
    if mebi <= SLOW:
        seconds = take_turns({FUSED: steps[FUSED], **eager}, rounds, device)
        rows += [compare(f"{mebi} Mi", name, seconds, FUSED) for name in eager]
    return rows


def memory_above(elements: int) -> dict[str, float]:
    """MB that a step takes at its peak beyond what was resident before it (Linux, CPU)."""
    peaks = {}
    steps, _ = contestants(elements, torch.device("cpu"))
    for name, step in steps.items():
        if not name.startswith("AlphaAdam") and name != FUSED:
            continue
        step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
        step()
        peaks[name] = (_resident("VmHWM") - before) / 1e3
    return peaks


def _resident(field: str) -> float:
    """A kB field of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return float(line.split()[1])


def draw(rows: Sequence[Row], subtitle: str, path: Path) -> None:
    """The step at 32 Mi elements, or the largest that was measured: bars, and numbers alone for slow contestants."""
    flat = [row for row in rows if row.case.endswith(" Mi") and row.name not in (COUNT, READ)]
    case = "32 Mi" if any(row.case == "32 Mi" for row in flat) else flat[-1].case
    clipped = next(row.ratio for row in flat if row.case == case and row.name == CLIPPED)
    ratios = {row.name: row.ratio * (clipped if row.against == CLIPPED else 1) for row in flat if row.case == case}
    shown = sorted(ratios, key=lambda name: ratios[name])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.36 * len(shown) + 1.5), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        for y, name in enumerate(shown):
            ratio, ours = ratios[name], name.startswith("AlphaAdam")
            bar = ratio <= AXIS
            axes.barh(y, ratio if bar else 0, color=OURS_COLOR if ours else PEERS_COLOR, height=0.66)
            number = f"{ratio:.2f}" if bar else f"{ratio:.1f} times fused AdamW"
            axes.text((ratio if bar else 0) + 0.02, y, number, va="center", color=INK, fontsize=9.5)
        axes.set_yticks(range(len(shown)), [f"{name} (default)" if name == DEFAULT else name for name in shown])
        for label, name in zip(axes.get_yticklabels(), shown, strict=True):
            label.set(color=OURS_COLOR if name.startswith("AlphaAdam") else PEERS_COLOR)
            label.set_fontweight("bold" if name == DEFAULT else "normal")
        axes.axvline(1.0, color=GREY, linewidth=1, linestyle=":")
        axes.set(xlabel=subtitle, xlim=(0, AXIS), ylim=(len(shown) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        figure.suptitle(f"time of a step, {FUSED} = 1: one flat tensor of {case} elements", x=0.01, ha="left",
                        fontsize=12, fontweight="bold", color=INK)  # fmt: skip
        figure.savefig(path)


def run(sizes: Sequence[int], rounds: int, device: torch.device, out: Path) -> None:
    """Measure, print, and write JSON and PNG into a folder."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(None, init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows: list[Row] = []
        for mebi in track(sizes, "flat tensors", console=console):
            rows += flat_tensor(mebi, rounds if mebi <= SLOW else max(3, rounds // 3), device)
        rows += small_tensors(rounds, device) + one_odd_tensor(rounds, device)
        started = start_up(device)
        memory: dict[str, float] = {}
        if device.type == "cpu":
            for stage in (2, 3):
                rows += offloaded(stage, rounds)
            memory = memory_above(32 * 2**20)
        dist.destroy_process_group()
    show(console, rows, memory)
    console.print(f"start-up with 10,000 parameters: {started:.2f} s", highlight=False)
    judge(console, rows, memory, MOST_MEMORY, {"seconds of start-up with 10,000 parameters": started})
    last = max(out.glob(f"*-step-time-{device.type}.json"), default=None)
    beside_last(console, rows, last)
    date, where = datetime.date.today().isoformat(), machine(device)
    result = {"date": date, **where, "rounds": rounds, "rows": [asdict(row) for row in rows], "memory_mb": memory,
              "start_up_s": started}  # fmt: skip
    stem = out / f"{date}-step-time-{device.type}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(
        rows,
        f"{where['machine']}, {where['threads']} threads, torch {where['torch']}, {date}",
        stem.with_suffix(".png"),
    )
    console.print(f"wrote {stem}.json and .png", highlight=False)
