"""What a step costs: AlphaAdam in each mode beside AdamW and its peers, in one run, on the same tensors.

    alphaadam bench                         some minutes; `make bench` does the same
    alphaadam bench --size 32 --rounds 9

Contestants take turns, so that what disturbs the machine disturbs all of them; a number is the median over the rounds
of the ratio to the peer in the same round. All share one parameter, gradient and pair of moments, so memory is as warm
for one as for the other. The last rows measure what a list of 300 small DTensors costs the host, DeepSpeed's
CPU-offloaded ZeRO-2 and ZeRO-3, and the memory a step takes beyond what lies there anyway.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from alphaadam_dist import AlphaAdam
from alphaadam_dist.training.plots import GREY, INK, STYLE
from benchmarks import baselines
from benchmarks.turns import BYTES, CLIPPED, FUSED, Row, Shared, Steps, compare, machine, take_turns

SIZES = (1, 4, 32, 256)  # Mi elements
SLOW = 32  # Mi elements above which eager peers are left out: they take seconds a step
OFFLOAD_PEER = "DeepSpeedCPUAdam"
DEFAULT = "AlphaAdam exact"
AXIS = 2.0
"""Of the picture, as a ratio to fused AdamW. It shows what a choice between these costs; slower ones are numbers."""
OURS_COLOR, PEERS_COLOR = "#d1495b", "#30638e"
RESULTS = Path(__file__).parent / "results"


BARS = {"AlphaAdam delayed": (FUSED, 1.03), "AlphaAdam exact": (FUSED, 1.55), "AlphaAdam clip_norm": (CLIPPED, 0.97)}
OURS: dict[str, dict[str, Any]] = {
    "exact": {},
    "delayed": {"sync": "delayed"},
    "clip_norm": {"clip_norm": 1.0},
    "layer": {"scope": "layer"},
    "threshold": {"threshold": 1 / 9},
    "threshold, delayed": {"threshold": 1 / 9, "sync": "delayed"},
}


def contestants(elements: int, device: torch.device) -> tuple[Steps, Steps]:
    """Steps on one and the same parameter, gradient and moments: of the fast, and of those in eager torch."""
    shared = Shared(elements, device)
    param, first, second, step_of = shared.param, shared.first, shared.second, shared.step_of
    steps = shared.peers()
    for name, options in OURS.items():
        steps[f"AlphaAdam {name}"] = step_of(AlphaAdam([param], fused=True, **options))
    eager = {
        "AlphaAdam reference kernels": step_of(AlphaAdam([param], fused=False)),
        "AdamW for-loop": step_of(torch.optim.AdamW([param], foreach=False)),
        "AdamW foreach": step_of(torch.optim.AdamW([param], foreach=True)),
        "C-AdamW": step_of(baselines.CAdamW([param])),
        "MGUP-AdamW": step_of(baselines.MGUPAdamW([param])),
    }
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
        row = compare(f"{mebi} Mi", name, seconds, against, bar if mebi == 32 else None)
        traffic = 28 if name == FUSED else BYTES.get(name.removeprefix("AlphaAdam "))
        if traffic is not None:
            speed = traffic * elements / (row.milliseconds / 1e3)
            row = Row(**{**asdict(row), "gigabytes_per_second": speed / 1e9, "share_of_copy": speed / copied})
        rows.append(row)
    if mebi <= SLOW:
        seconds = take_turns({FUSED: steps[FUSED], **eager}, rounds, device)
        rows += [compare(f"{mebi} Mi", name, seconds, FUSED) for name in eager]
    return rows


def small_tensors(rounds: int, device: torch.device) -> list[Row]:
    """300 DTensors of 1024 elements, as FSDP2 has them: what a step costs the host."""
    mesh = init_device_mesh(device.type, (1,))

    def named() -> list[tuple[str, nn.Parameter]]:
        made = []
        for i in range(300):
            param = nn.Parameter(distribute_tensor(torch.randn(64, 16, device=device), mesh, [Shard(0)]))
            param.grad = distribute_tensor(torch.randn(64, 16, device=device), mesh, [Shard(0)])
            made.append((f"w{i}", param))
        return made

    steps: Steps = {FUSED: torch.optim.AdamW(named(), fused=True).step}
    for name in ("exact", "delayed", "clip_norm", "layer"):
        steps[f"AlphaAdam {name}"] = AlphaAdam(
            named(), fused=True, process_group=dist.group.WORLD, **OURS[name]
        ).step  # fmt: skip
    seconds = take_turns(steps, 3 * rounds, device)
    return [compare("300 DTensors", name, seconds, FUSED, None if name == FUSED else 0.5) for name in steps]


def offloaded(stage: int, rounds: int) -> list[Row]:
    """ZeRO with the optimizer on the CPU, 32 Mi bf16 parameters, clipped: engine.step(), and the optimizer's share."""
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists
    steps: Steps = {}
    backwards: Steps = {}
    shares: dict[str, list[float]] = {}
    for name in (OFFLOAD_PEER, "AlphaAdam delayed", "AlphaAdam exact"):
        options = {"lr": 1e-3, "sync": name.removeprefix("AlphaAdam "), "fused": True}
        adam = {"type": "AdamW", "params": {"lr": 1e-3}}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
            "optimizer": adam if name == OFFLOAD_PEER else {"type": "AlphaAdam", "params": options},
        }
        model = _Sum()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        shares[name] = _timed(engine.optimizer)
        steps[name] = engine.step
        backwards[name] = partial(_backward, engine)
    seconds = take_turns(steps, rounds, torch.device("cpu"), backwards)
    share = {name: times[1:] for name, times in shares.items()}
    rows = []
    for name in shares:
        bar = {"AlphaAdam delayed": 0.85, "AlphaAdam exact": 1.10}.get(name)
        rows.append(compare(f"ZeRO-{stage} offload, optimizer", name, share, OFFLOAD_PEER, bar))
        rows.append(compare(f"ZeRO-{stage} offload, engine.step()", name, seconds, OFFLOAD_PEER))
    return rows


class _Sum(nn.Module):
    """32 Mi parameters and next to no work beside their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4096, 4096)) for _ in range(2)])

    def forward(self, seed: Tensor) -> Tensor:
        return torch.stack([(weight * seed).sum() for weight in self.weights]).sum()


def _backward(engine: Any) -> None:
    engine.backward(engine(torch.tensor(1.0)))


def _timed(zero: Any) -> list[float]:
    """Seconds that the optimizer itself takes in each step of a ZeRO wrapper, appended as it goes."""
    times: list[float] = []
    step, unscale = zero.optimizer.step, zero.unscale_and_clip_grads
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            result = function(*args, **kwargs)
            inside += time.perf_counter() - start
            return result

        return call

    zero.optimizer.step, zero.unscale_and_clip_grads = timed(step), timed(unscale)
    whole = zero.step

    def whole_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside = 0.0
        result = whole(*args, **kwargs)
        times.append(inside)
        return result

    zero.step = whole_step
    return times


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


def show(console: Console, rows: Sequence[Row], memory: dict[str, float]) -> None:
    """Print one line a row."""
    table = Table(title="a step, median of paired ratios", box=None, header_style="bold", pad_edge=False)
    for heading in ("case", "", "ms", "against", "ratio", "middle half", "bar", "GB/s", "of copy"):
        table.add_column(heading, justify="left" if heading in ("case", "", "against") else "right")
    for row in rows:
        met = "" if row.bar is None else f"{'green' if row.ratio <= row.bar else 'red'}"
        ratio = f"{row.ratio:.3f}" if not met else f"[{met}]{row.ratio:.3f}[/{met}]"
        table.add_row(
            row.case, row.name, f"{row.milliseconds:.2f}", row.against, ratio,
            f"{row.spread[0]:.2f} to {row.spread[1]:.2f}", "" if row.bar is None else f"{row.bar:.2f}",
            "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.1f}",
            "" if row.share_of_copy is None else f"{row.share_of_copy:.0%}",
        )  # fmt: skip
    console.print(table)
    for name, megabytes in memory.items():
        console.print(f"{name}: {megabytes:.2f} MB at the peak of a step beyond what was there", highlight=False)


def draw(rows: Sequence[Row], subtitle: str, path: Path) -> None:
    """The step at 32 Mi elements, or the largest that was measured: bars, and numbers alone for slow contestants."""
    flat = [row for row in rows if row.case.endswith(" Mi")]
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
        rows += small_tensors(rounds, device)
        memory: dict[str, float] = {}
        if device.type == "cpu":
            for stage in (2, 3):
                rows += offloaded(stage, rounds)
            memory = memory_above(32 * 2**20)
        dist.destroy_process_group()
    show(console, rows, memory)
    date, where = datetime.date.today().isoformat(), machine(device)
    result = {"date": date, **where, "rounds": rounds, "rows": [asdict(row) for row in rows], "memory_mb": memory}
    stem = out / f"{date}-step-time-{device.type}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(
        rows,
        f"{where['machine']}, {where['threads']} threads, torch {where['torch']}, {date}",
        stem.with_suffix(".png"),
    )
    console.print(f"wrote {stem}.json and .png", highlight=False)
