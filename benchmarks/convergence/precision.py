"""The command ``python -m benchmarks.convergence.precision``: does AlphaAdam train as well with bf16 state?

fp32, bf16 moments, and bf16 parameters with bf16 moments, rounded as the library does it and to the nearest, on the
language tasks at the rate that fp32 was tuned to, five seeds, paired. The model computes in fp32 in all of them, so
that a difference is the optimizer's. At two values of beta2, because a moment of which a step changes less than half a
unit in the last place stands still when it is rounded to the nearest.
"""

from __future__ import annotations

import datetime
from statistics import fmean

import torch
import typer
from rich.progress import track

from . import tasks
from .__main__ import CACHE, RESULTS, machine
from .analysis import paired
from .protocol import SMALL
from .report import show, table
from .runner import Runner, start_process
from .runs import Job
from .trial import Setting
from .variants import PRECISIONS, Variant

RATES = {"gpt": 4, "llama": 6, "finetune": 4}
"""The best of AlphaAdam in fp32, 4e-3 and 8e-3, in half octaves above 1e-3 (results/2026-11-24-convergence.md)."""
SEEDS = (1, 2, 3, 4, 5)
LENGTHS: dict[int, tuple[str, ...]] = {1: tuple(RATES), 4: ("gpt",)}
"""The tasks at each multiple of their own steps."""


def main() -> None:
    """Run what has not been run, then write the tables and every run."""
    start_process()
    tasks.pretrain(SMALL)
    runner = Runner(SMALL, CACHE, workers=2)
    jobs = [
        job
        for length, names in LENGTHS.items() for task in names for variant in PRECISIONS
        for job in of(task, variant, length)
    ]  # fmt: skip
    left = [job for job in jobs if job not in runner.done]
    results = runner.results(lambda: [job for job in left if job not in runner.done])
    for _ in track(results, "precisions", total=len(left)):
        pass
    date, where = datetime.date.today().isoformat(), machine()
    stem = RESULTS / f"{date}-precision"
    head = f"{date}, {where}, torch {torch.__version__}; `python -m benchmarks.convergence.precision`."
    stem.with_suffix(".md").write_text("\n".join([*report(runner, head), ""]))
    runner.publish(stem.with_suffix(".jsonl.gz"), jobs)
    print(f"wrote {stem.with_suffix('.md')}")


def of(task: str, variant: Variant, length: int) -> list[Job]:
    """One run a seed."""
    return [Job(task, variant.name, Setting(RATES[task]), seed, length=length) for seed in SEEDS]


def report(runner: Runner, head: str) -> list[str]:
    """A table for each length of training: the loss in fp32, and what the others differ from it."""
    titles = {task.name: task.title for task in tasks.tasks(runner.scale)}
    lines = [
        "# bf16 state and parameters: the tables",
        "",
        head,
        "",
        f"Held-out loss of {len(SEEDS)} seeds; the fp32 rows have the loss, the others their difference to the fp32 "
        "row above. **Bold**: the 95 % interval of the paired difference leaves 0 out. Negative is better.",
    ]
    for length, names in LENGTHS.items():
        rows = []
        for variant in PRECISIONS:
            own = {task: [runner.done[job].documents for job in of(task, variant, length)] for task in names}
            if variant.name.startswith("fp32"):
                base = own
                rows.append([variant.name, *(f"{fmean(map(fmean, losses)):.3f}" for losses in own.values())])
            else:
                rows.append([variant.name, *(show(paired(own[task], base[task])) for task in names)])
        lines += ["", f"## {length} times the steps" if length > 1 else "## The tasks' own steps", ""]
        lines += table(["", *(titles[task] for task in names)], rows)
    return lines


if __name__ == "__main__":
    typer.run(main)
