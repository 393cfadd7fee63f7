"""The command: run all rounds of all tasks, then write the report."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import plots, protocol, report, tasks, timing
from .runner import Runner, results_file, start_process

RUNS = Path("runs/convergence")
RESULTS = Path(__file__).parent.parent / "results"


def main(
    large: Annotated[bool, typer.Option("--large", help="Models of 100M parameters and more.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda for --large.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Model to fine-tune: hub id or folder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the longest task.")] = None,
    out: Annotated[Path, typer.Option(help="Where tables and pictures go.")] = RESULTS,
    report_only: Annotated[bool, typer.Option("--report", help="Run nothing, report what is finished.")] = False,
    workers: Annotated[int, typer.Option(help="Processes, one thread each; 1 for a GPU.")] = 2,
) -> None:
    """Compare optimizers at equal tuning budgets. Finished runs are kept: start again to go on."""
    start_process()
    scale = tasks.LARGE if large else tasks.SMALL
    scale = replace(
        scale,
        device=device or scale.device,
        pretrained=pretrained or scale.pretrained,
        steps=steps or scale.steps,
    )
    if scale.pretrained is None:
        tasks.pretrain(scale)
    console = Console()
    runner = Runner(scale, results_file(scale, RUNS), workers)
    times: report.Times = {}
    if not report_only:
        _sweep(scale, runner, console)
        console.print("step times, one thread")
        times = timing.step_times(scale)
    date = datetime.date.today().isoformat()
    stem = out / f"{date}-convergence{'-large' if large else ''}"
    report.write(stem, scale, runner.done, times, machine(), date)
    for path in (stem.with_suffix(".md"), *plots.draw(stem, scale, runner.done)):
        console.print(f"wrote {path}", highlight=False)


def _sweep(scale: tasks.Scale, runner: Runner, console: Console) -> None:
    columns = (TextColumn("{task.description:42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name, jobs_of in protocol.ROUNDS.items():
            for task in protocol.tasks_of(name, scale):
                jobs = list(dict.fromkeys(jobs_of(task, runner.done)))
                for _ in progress.track(runner.results(jobs), len(jobs), description=f"{task.title}: {name}"):
                    pass
    runner.close()


def machine() -> str:
    """This machine in words."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {platform.machine()}, {gpu}"


if __name__ == "__main__":
    typer.run(main)
