"""The command: run all rounds of all tasks, then write the report."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import counterexamples, plots, protocol, report, tasks, timing
from .protocol import Study
from .runner import Runner, results_file, start_process
from .trial import Task
from .variants import ADAMW, ALPHAADAM, VARIANTS, Variant

RUNS = Path("runs/convergence")
RESULTS = Path(__file__).parent.parent / "results"


def main(
    large: Annotated[bool, typer.Option("--large", help="Models of 100M parameters and more.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda for --large.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Model to fine-tune: hub id or folder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the longest task.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help="Only this one beside AdamW and AlphaAdam, by its name in the tables.")
    ] = None,
    controls: Annotated[bool, typer.Option(help="After the finals, the controls.")] = True,
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
    runner = Runner(scale, results_file(scale, RUNS), workers)
    trainings = tasks.tasks(scale)
    on = _only("--task", task, [*trainings, *counterexamples.TASKS])
    study = Study(
        tuple(t for t in trainings if t in on),
        tuple(t for t in counterexamples.TASKS if t in on),
        _only("--optimizer", optimizer and [ADAMW, ALPHAADAM, *optimizer], VARIANTS),
        runner.done,
    )
    console = Console()
    times: report.Times = {}
    if not report_only:
        if scale.pretrained is None and any(t.name == "finetune" for t in study.tasks):
            tasks.pretrain(scale)
        _sweep(study, runner, console, controls)
        console.print("step times, one thread")
        times = timing.step_times(study)
    date = datetime.date.today().isoformat()
    part = "-part" if task or optimizer or not controls else ""
    stem = out / f"{date}-convergence{'-large' if large else ''}{part}"
    report.write(stem, scale, study, times, machine(), date)
    for path in (stem.with_suffix(".md"), *plots.draw(stem, study)):
        console.print(f"wrote {path}", highlight=False)


N = TypeVar("N", Task, Variant)


def _only(option: str, names: list[str] | None, known: Sequence[N]) -> tuple[N, ...]:
    """Those with these names, or all where there are none."""
    wanted = names or [one.name for one in known]
    for name in wanted:
        if name not in [one.name for one in known]:
            raise typer.BadParameter(f"{name}; there are {', '.join(one.name for one in known)}", param_hint=option)
    return tuple(one for one in known if one.name in wanted)


def _sweep(study: Study, runner: Runner, console: Console, controls: bool) -> None:
    columns = (TextColumn("{task.description:42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name, jobs_of in protocol.ROUNDS.items():
            if name in protocol.CONTROLS and not controls:
                continue
            for task in study.tasks_of(name):
                jobs = list(dict.fromkeys(jobs_of(study, task)))
                for _ in progress.track(runner.results(jobs), len(jobs), description=f"{task.title}: {name}"):
                    pass
    runner.close()


def machine() -> str:
    """This machine in words."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {platform.machine()}, {gpu}"


if __name__ == "__main__":
    typer.run(main)
