"""What ``engine.step()`` does to memory under ZeRO with the optimizer on the CPU: every pass over 32 Mi a rank.

    python -m benchmarks.offload_passes

Runs DeepSpeedCPUAdam and AlphaAdam at ZeRO-2 and ZeRO-3 on one and on two ranks, bf16, clipped, under torch's profiler,
and writes a table of the operators that touched a large tensor, with the time of one step.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile, record_function

from alphaadam_dist.training.start_ranks import free_port
from benchmarks.offload import CONTESTANTS, backward, engine_of
from benchmarks.turns import machine

STEPS = 5
LARGE = 2**20  # elements from which on a tensor is a pass over memory
OUT = Path(__file__).parent / "results"


def passes(stage: int, name: str) -> list[tuple[str, int, float]]:
    """Operator with its large inputs, calls a step and milliseconds a step, of this rank."""
    engine = engine_of(stage, name)
    for holder, method in ((engine.optimizer.optimizer, "step"), (engine.optimizer, "unscale_and_clip_grads")):
        setattr(holder, method, _recorded(f"{method} of the optimizer, all in it", getattr(holder, method)))
    for _ in range(2):
        backward(engine)
        engine.step()
    found: dict[str, tuple[int, float]] = {}
    for _ in range(STEPS):
        backward(engine)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            engine.step()
        for event in seen.key_averages(group_by_input_shape=True):
            shapes = [shape for shape in event.input_shapes if shape and torch.Size(_flat(shape)).numel() >= LARGE]
            whole = "all in it" in event.key
            if not (shapes or whole or event.key.startswith("alphaadam::")):  # of lists the profiler tells no shape
                continue
            calls, took = found.get(event.key, (0, 0.0))
            time = event.cpu_time_total if whole else event.self_cpu_time_total
            found[event.key] = calls + event.count, took + time / 1e3
    rows = [(key, round(calls / STEPS), took / STEPS) for key, (calls, took) in found.items()]
    return sorted((row for row in rows if row[2] >= 0.5), key=lambda row: -row[2])


def _flat(shape: Any) -> list[int]:
    """The dimensions of a tensor; of a list of tensors those of its first."""
    return _flat(shape[0]) if shape and isinstance(shape[0], list | tuple) else list(shape)


def _recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def _rank(rank: int, world: int, port: int, stage: int, name: str, out: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), LOCAL_SIZE=str(world))  # fmt: skip
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    dist.init_process_group("gloo")
    rows = passes(stage, name)
    if rank == 0:
        Path(out).write_text("".join(f"| `{key}` | {calls} | {took:.1f} |\n" for key, calls, took in rows))
    dist.barrier()
    os._exit(0)  # DeepSpeed's threads may abort an orderly exit


def main() -> None:
    """Write the tables into benchmarks/results/."""
    date, where = datetime.date.today().isoformat(), machine(torch.device("cpu"))
    text = [
        f"# Passes over memory of `engine.step()`, ZeRO with CPU offload, {date}\n\n"
        f"{where['machine']}, {where['threads']} threads in all, torch {where['torch']}: 32 Mi bf16 parameters a\n"
        f"rank, clipped, mean of {STEPS} profiled steps of rank 0. An operator's time is its own, without those it\n"
        "calls; what has no row took under 0.5 ms. Both Adams' own passes are inside `step`.\n"
    ]
    for world in (1, 2):
        for stage in (2, 3):
            for name in CONTESTANTS:
                with tempfile.TemporaryDirectory() as folder:
                    mp.spawn(_rank, (world, free_port(), stage, name, f"{folder}/rows"), nprocs=world)
                    table = Path(folder, "rows").read_text()
                text.append(f"\n## ZeRO-{stage}, {world} rank{'s' * (world > 1)}, {name}\n\n"
                            f"| operator | calls | ms |\n|---|---|---|\n{table}")  # fmt: skip
    path = OUT / f"{date}-offload-passes.md"
    path.write_text("".join(text))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
