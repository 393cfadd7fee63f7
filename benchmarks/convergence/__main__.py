"""The command: run what is not finished, most urgent first, then write the report."""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import plots, protocol, report, tasks
from .protocol import Case, Missing, Seeds, Stage, Study
from .runner import Runner, start_process
from .variants import ADAMW, Variant

CACHE = Path("runs/convergence")
RESULTS = Path(__file__).parent.parent / "results"
PAGE = Path("docs/results.md")


def main(
    long: Annotated[bool, typer.Option("--long", help="All stages, up to 16 times the steps: hours.")] = False,
    large: Annotated[bool, typer.Option("--large", help="Models of 22M to 135M parameters, on a GPU.")] = False,
    task: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    optimizer: Annotated[list[str] | None, typer.Option(help="Only this one beside AdamW, by its name.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda for --large.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of text to train on; Python's standard library.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Model to fine-tune: hub id, folder or GGUF file.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder to fine-tune: hub id or folder.")] = None,
    glue: Annotated[str | None, typer.Option(help="Folder with train.tsv and dev.tsv or held_out.tsv.")] = None,
    cache: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = CACHE,
    out: Annotated[Path, typer.Option(help="Where tables and pictures go.")] = RESULTS,
    minutes: Annotated[float, typer.Option(help="Start no run after so many.")] = math.inf,
    workers: Annotated[int, typer.Option(help="Processes, one thread each; 1 for a GPU.")] = 2,
    status: Annotated[bool, typer.Option("--status", help="Run nothing, say what is done and left.")] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Run nothing, write tables and pictures.")] = False,
    fill: Annotated[bool, typer.Option("--fill", help="Put the tables into docs/results.md, too.")] = False,
) -> None:
    """Compare optimizers at equal tuning budgets. Finished runs are kept: start again to go on."""
    start_process()
    given: dict[str, Any] = {"device": device, "data": data, "pretrained": pretrained, "encoder": encoder, "glue": glue}
    scale = replace(
        protocol.LARGE_SCALE if large else protocol.SMALL, **{k: v for k, v in given.items() if v is not None}
    )
    runner = Runner(scale, cache, workers)
    stages = protocol.LARGE if large else protocol.LONG if long else protocol.SHORT
    study = Study(
        {task.name: task for task in tasks.tasks(scale)},
        _chosen(stages, task, optimizer),
        protocol.LARGE_SEEDS if large else Seeds(),
        runner.done,
        () if large or task or optimizer else protocol.counterexamples.TASKS,
    )
    console = Console()
    if status:
        print(_status(study))
        return
    if not report_only:
        if scale.pretrained is None and any(case.task == "finetune" for case, _ in study.cells()):
            tasks.pretrain(scale)
        _sweep(study, runner, console, minutes)
    date = datetime.date.today().isoformat()
    kind = "-large" if large else "-long" if long else ""
    stem = out / f"{date}-convergence{kind}{'-part' if task or optimizer else ''}"
    tables = report.write(stem.with_suffix(".md"), study, f"{date}, {machine()}")
    runner.publish(stem.with_suffix(".jsonl.gz"), study.done)
    written = [stem.with_suffix(".md"), stem.with_suffix(".jsonl.gz"), *plots.draw(stem, study)]
    if fill:
        report.fill(PAGE, tables)
        written.append(PAGE)
    for path in written:
        console.print(f"wrote {path}", highlight=False)


def _chosen(stages: Sequence[Stage], names: list[str] | None, optimizers: list[str] | None) -> tuple[Stage, ...]:
    """The stages with these tasks and optimizers alone. Raises BadParameter for a name that none has."""
    known = {case.task for stage in stages for case in stage.cases}
    variants = {variant.name for stage in stages for variant in stage.variants}
    for option, wanted, offered in (("--task", names, known), ("--optimizer", optimizers, variants)):
        for name in wanted or []:
            if name not in offered:
                raise typer.BadParameter(f"{name}; there are {', '.join(sorted(offered))}", param_hint=option)

    def has(variant: Variant) -> bool:
        return optimizers is None or variant.name in (ADAMW, *optimizers)

    chosen = [
        replace(
            stage,
            cases=tuple(case for case in stage.cases if not names or case.task in names),
            variants=tuple(filter(has, stage.variants)),
            against=tuple(name for name in stage.against if has(protocol.BY_NAME[name])),
        )
        for stage in stages
    ]
    return tuple(stage for stage in chosen if stage.cases and len(stage.variants) > 1)


def _sweep(study: Study, runner: Runner, console: Console, minutes: float) -> None:
    """Run, and print a row for each optimizer that is finished in a case."""
    finished: set[tuple[str, ...]] = set()
    open_cells = [cell for cell in study.cells() if not study.has(*cell)]
    begin = time.monotonic()
    for count, _ in enumerate(runner.results(lambda: protocol.wanted(study, finished), minutes), start=1):
        for case, variant in [cell for cell in open_cells if study.has(*cell)]:
            open_cells.remove((case, variant))
            console.print(_row(study, case, variant, count, time.monotonic() - begin), highlight=False)


def _row(study: Study, case: Case, variant: Variant, runs: int, seconds: float) -> str:
    end = report.loss(study, case, variant.name)
    try:
        gain = "" if variant.name == ADAMW else report.show(report.against(study, case, variant.name, ADAMW))
    except Missing:
        gain = ""
    return f"{seconds / 60:6.1f} min {runs:5} runs  {_where(study, case):48}{variant.name:24}{end:.4f} {gain}"


def _where(study: Study, case: Case) -> str:
    return f"{report.label(study, case)}, {case.length}x steps{'' if case.clip else ', no clipping'}"


def _status(study: Study) -> str:
    """A line for each case of each stage: what is finished, what is next, what one process may take for the rest."""
    hours = {
        (case, variant.name): 0.0 if study.has(case, variant) else RUNS_EACH * seconds(study, case) / 3600
        for case, variant in study.cells()
    }
    lines = [f"{'':42}{'':48}{'finished':>8}  {'hours':>5}  next"]
    for stage in study.stages:
        for case in stage.cases:
            of_case = [(case, variant.name) for variant in stage.variants]
            left = [cell for cell in of_case if hours[cell]]
            done = f"{len(of_case) - len(left)} of {len(of_case)}"
            first = left[0][1] if left else ""
            took = sum(hours[cell] for cell in left)
            lines.append(f"{stage.title:42}{_where(study, case):48}{done:>8}  {took:5.1f}  {first}")
    return "\n".join([*lines, f"{len(study.done)} runs done, about {sum(hours.values()):.1f} hours left"])


RUNS_EACH = 24
"""An optimizer in a case takes about so many: 8 settings on two seeds, and the finals."""


def seconds(study: Study, case: Case) -> float:
    """What a run of a case takes: the mean of those that are done, or else by its steps and its size."""
    took = [r.seconds for job, r in study.done.items() if (job.task, job.size, job.length) == _key(case)]
    return fmean(took) if took else 0.5 + 0.01 * study.tasks[case.task].steps * case.length * case.size**0.6


def _key(case: Case) -> tuple[str, int, int]:
    return case.task, case.size, case.length


def machine() -> str:
    """This machine in words."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {platform.machine()}, {gpu}"


if __name__ == "__main__":
    typer.run(main)
