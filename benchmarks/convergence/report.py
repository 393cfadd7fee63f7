"""The report: tables in Markdown, every run in JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from . import analysis, protocol
from .analysis import Difference
from .protocol import COUNTEREXAMPLE_SEEDS, SEEDS, Study
from .runs import Result
from .tasks import Scale
from .trial import Task
from .variants import ADAMW, ALPHAADAM

Times = dict[str, dict[str, tuple[float, float]]]

CONTROLS = {
    "best rate": protocol.final,
    "no clipping": protocol.unclipped,
    "twice the rate": protocol.doubled,
    "four times the steps": protocol.four_times,
}


def write(stem: Path, scale: Scale, study: Study, times: Times, machine: str, date: str) -> None:
    """Write ``stem``.md and ``stem``.json: of a sweep cut short what is finished, and without ``times`` none."""
    all_of = study.finished("finals")
    lines = [
        "# Convergence: the tables",
        "",
        f"{date}, {machine}, torch {torch.__version__}; `python -m benchmarks.convergence`. What it means is in "
        "[docs/results.md](../../docs/results.md).",
        "",
        f"{len(SEEDS)} seeds; each optimizer at its own best learning rate. **Bold**: the 95 % interval of the paired "
        "difference leaves 0 out. Negative is better.",
        "",
        "## Held-out loss, difference to AdamW",
        "",
        *_differences(study, all_of, ADAMW),
        "",
        "## Held-out loss, difference to AlphaAdam with its defaults",
        "",
        *_differences(study, all_of, ALPHAADAM),
    ]
    for task in all_of:
        lines += ["", f"## {task.title}", "", *_task(study, task, times.get(task.name))]
    lines += ["", "## Tuning: the best learning rate, and its loss on the three tuning seeds", ""]
    lines += _tuning(study, all_of)
    lines += ["", "## Controls: difference to AdamW under the same control", ""]
    lines += [f"Loss of AdamW, and the differences to it. Seeds {SEEDS[0]} to {SEEDS[-1]}.", ""]
    lines += _controls(study)
    lines += ["", "## The embedding's learning rate tuned as well: difference to AdamW under the same control", ""]
    lines += _embedding_tuned(study, study.finished("tuned controls"))
    lines += ["", "## Alpha", "", *_alphas(study, all_of)]
    lines += ["", "## Counterexamples", ""]
    for task in study.finished(protocol.COUNTEREXAMPLES):
        lines += [f"### {task.title}", "", *_counterexample(study, task), ""]
    stem.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    stem.with_suffix(".json").write_text(
        json.dumps(
            {
                "date": date,
                "machine": machine,
                "torch": torch.__version__,
                "scale": asdict(scale),
                "step_milliseconds": times,
                "runs": [entry(result) for result in study.done.values()],
            }
        )
        + "\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def show(difference: Difference) -> str:
    if math.isnan(difference.mean):
        return "diverged"
    text = f"{difference.mean:+.3f} ± {difference.half:.3f}"
    return f"**{text}**" if difference.clear else text


def _differences(study: Study, all_of: Sequence[Task], other: str) -> list[str]:
    rows = [
        [variant.name, *(show(analysis.against(task, variant.name, other, study.done)) for task in all_of)]
        for variant in study.variants if variant.name != other
    ]  # fmt: skip
    return table(["", *(task.title for task in all_of)], rows)


def _task(study: Study, task: Task, times: dict[str, tuple[float, float]] | None) -> list[str]:
    done, edges = study.done, (min(task.rates), max(task.rates))
    rows = []
    for variant in study.variants:
        rate = protocol.best_rate(task, variant, done)
        losses = analysis.losses(task, variant.name, done)
        reached = analysis.reached_adamw(task, variant.name, done)
        row = [
            variant.name,
            f"{rate * variant.lr_scale:g}" + (" (edge)" if rate in edges else ""),
            f"{statistics.fmean(losses):.3f} ({statistics.stdev(losses):.3f})",
            f"{reached.share:.2f} ({reached.seeds})" if reached.seeds else f"- ({reached.seeds})",
        ]
        if times is not None:
            # the same model for all: what its own step seems to take with one and the other is the machine's noise
            model = statistics.median(of_model for of_model, _ in times.values())
            pace = (model + times[variant.name][1]) / (model + times[ADAMW][1])
            row += [
                f"{reached.share * pace:.2f}" if reached.seeds else "-",
                f"{model:.1f} + {times[variant.name][1]:.1f}",
            ]
        rows.append(row)
    head = ["", "lr", f"{task.measure} (sd)", "steps to AdamW's best, as a share of AdamW's (seeds)"]
    if times is not None:
        head += ["the same in time", "CPU ms a step: model + optimizer"]
    return table(head, rows)


def _tuning(study: Study, all_of: Sequence[Task]) -> list[str]:
    done, rows = study.done, []
    for variant in study.variants:
        row = [variant.name]
        for task in all_of:
            rate = protocol.best_rate(task, variant, done)
            loss = protocol.tuning_loss(task, variant, rate, done)
            edge = ", edge" if rate in (min(task.rates), max(task.rates)) else ""
            row.append(f"{loss:.3f} ({rate * variant.lr_scale:g}{edge})")
        rows.append(row)
    return table(["", *(task.title for task in all_of)], rows)


def _controls(study: Study) -> list[str]:
    others = [variant for variant in study.controlled if variant.name != ADAMW]
    done, rows = study.done, []
    for task in study.tasks:
        for control, choose in CONTROLS.items():
            try:
                adamw = statistics.fmean(analysis.losses(task, ADAMW, done, choose))
                cells = [show(analysis.against(task, variant.name, ADAMW, done, choose)) for variant in others]
            except KeyError:  # not run yet
                continue
            if choose is protocol.four_times:
                chosen = [protocol.chosen(protocol.longer, task, variant, done) for variant in study.controlled]
                control += f" (rate x {', '.join(f'{protocol.LONGER_MULTIPLIERS[i]:g}' for i in chosen)})"
            rows.append([task.title, control, f"{adamw:.3f}", *cells])
    return table(["", "control", ADAMW, *(variant.name for variant in others)], rows)


def _embedding_tuned(study: Study, all_of: Sequence[Task]) -> list[str]:
    choose = protocol.embedding_tuned
    done, rows = study.done, []
    for variant in study.variants:
        row = [variant.name]
        for task in all_of:
            if variant.name == ADAMW:
                cell = f"{statistics.fmean(analysis.losses(task, ADAMW, done, choose)):.3f}"
            else:
                cell = show(analysis.against(task, variant.name, ADAMW, done, choose))
            multiplier = protocol.EMBEDDING_MULTIPLIERS[protocol.chosen(protocol.embeddings, task, variant, done)]
            row.append(f"{cell}, x {multiplier:g}")
        rows.append(row)
    return [
        "AdamW's loss, the others' differences to it, and the multiple of the learning rate that tuning chose.",
        "",
        *table(["", *(t.title for t in all_of)], rows),
    ]


def _alphas(study: Study, all_of: Sequence[Task]) -> list[str]:
    rows = []
    for variant in study.variants:
        finals = [[protocol.final(task, variant, study.done, seed) for seed in SEEDS] for task in all_of]
        results = [[study.done[job] for job in jobs] for jobs in finals]
        if results and results[0][0].alpha_mean is not None:
            rows.append([variant.name, *(_alpha(of_task) for of_task in results)])
    return [
        "Mean over the steps, and the largest of any step and seed.",
        "",
        *table(["", *(t.title for t in all_of)], rows),
    ]


def _alpha(results: Sequence[Result]) -> str:
    means = [result.alpha_mean for result in results if result.alpha_mean is not None]
    peaks = [result.alpha_peak for result in results if result.alpha_peak is not None]
    return f"{statistics.fmean(means):.2f}, {max(peaks):.2f}"


def _counterexample(study: Study, task: Task) -> list[str]:
    rows = []
    for variant in study.variants:
        row = [variant.name]
        for rate in task.rates:
            end = analysis.ends(task, variant, rate, study.done)
            row.append(f"{end:.3g}" if math.isfinite(end) else "diverged")
        rows.append(row)
    seeds = len(COUNTEREXAMPLE_SEEDS)
    rates = "by learning rate (Lion's is half of it, AlphaLion's a quarter)"
    caption = f"{task.measure.capitalize()}, mean of {seeds} seeds, {rates}."
    return [caption, "", *table(["", *(f"{rate:g}" for rate in task.rates)], rows)]


def entry(result: Result) -> dict[str, object]:
    """A run as the JSON has it: losses to five digits, None where it diverged."""
    curve = [[step, round(loss, 5) if math.isfinite(loss) else None] for step, loss in result.curve]
    return {**asdict(result), "curve": curve}
