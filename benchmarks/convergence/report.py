"""The report: tables in Markdown, and those that docs/results.md shows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch

from . import analysis, counterexamples, protocol
from .analysis import Difference
from .protocol import Case, Missing, Stage, Study
from .runs import Result
from .search import at_end
from .trial import Setting
from .variants import ADAMW, BY_NAME, CORE, VARIANTS

LENGTHS = {case.task: [Case(case.task), Case(case.task, length=4), case] for case in protocol.SIXTEEN.cases}
SIZES = {"llama": [Case("llama"), *protocol.SIZES.cases]}
Tables = Mapping[str, list[str]]


def write(page: Path, study: Study, when_and_where: str) -> Tables:
    """Write a page of all tables, of a sweep cut short what is finished. Returns the tables by name."""
    tables = all_tables(study)
    seeds = len(study.seeds.finals)
    lines = [
        "# Convergence: the tables",
        "",
        f"{when_and_where}, torch {torch.__version__}; `python -m benchmarks.convergence`. What it means is in "
        f"[docs/results.md](../../docs/results.md); {page.stem}.jsonl.gz has every run, as the cache does.",
        "",
        f"Held-out loss, {seeds} seeds, each optimizer at its own best setting, and the 95 % interval of the paired "
        "difference over seeds and held-out documents. **Bold**: clear of 0 also where all differences of a table are "
        "looked at together (Holm). Negative is better.",
    ]
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", *rows]
    page.write_text("\n".join(lines) + "\n")
    return tables


def all_tables(study: Study) -> dict[str, list[str]]:
    """Title -> the lines of a table, of all that have something to show."""
    tables = {}
    for stage in study.stages:
        for other in stage.against:
            tables[f"{stage.title}: difference to {other}"] = differences(study, stage, other)
        tables[f"{stage.title}: the settings"] = settings(study, stage)
    tables["Does the gain last? Length"] = lasting(study, LENGTHS, "steps")
    tables["Does the gain last? Size"] = lasting(study, SIZES, "parameters and steps")
    tables["Alpha"] = alphas(study)
    for task in study.counterexamples:
        tables[f"Counterexample: {task.title}"] = counterexample(study, task.name)
    return {title: rows for title, rows in tables.items() if rows}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def show(difference: Difference, clear: bool | None = None) -> str:
    """The difference with its interval, bold where it is clear: by itself, or as ``clear`` says."""
    if math.isnan(difference.mean):
        return "diverged"
    text = f"{difference.mean:+.3f} ± {difference.half:.3f}"
    return f"**{text}**" if (difference.clear if clear is None else clear) else text


def losses(study: Study, case: Case, name: str) -> list[list[float]]:
    """A row of held-out losses for each seed. Raises Missing."""
    return [result.documents for result in study.finals(case, BY_NAME[name])]


def loss(study: Study, case: Case, name: str) -> float:
    """The mean over seeds and documents, infinite where one diverged. Raises Missing."""
    return fmean(result.final for result in study.finals(case, BY_NAME[name]))


def against(study: Study, case: Case, name: str, other: str) -> Difference:
    """Raises Missing."""
    return analysis.paired(losses(study, case, name), losses(study, case, other))


def finished(study: Study, cases: Iterable[Case], names: Sequence[str]) -> list[Case]:
    """The cases in which all of these have their finals."""
    return [case for case in cases if all(study.has(case, BY_NAME[name]) for name in names)]


def differences(study: Study, stage: Stage, other: str) -> list[str]:
    """A row an optimizer, a column a case; first the other's own loss. A cell without results is empty."""
    names = [variant.name for variant in stage.variants if variant.name != other]
    cases = finished(study, stage.cases, [other])
    found = {(n, c): against(study, c, n, other) for n in names for c in cases if study.has(c, BY_NAME[n])}
    clear = dict(zip(found, analysis.holm(list(found.values())), strict=True))
    if not found:
        return []
    rows = [[f"{other}: loss", *(f"{loss(study, case, other):.3f}" for case in cases)]]
    for name in names:
        at = [(name, case) for case in cases]
        rows.append([name, *(show(found[cell], clear[cell]) if cell in found else "" for cell in at)])
    return table(["", *(label(study, case) for case in cases)], rows)


def settings(study: Study, stage: Stage) -> list[str]:
    """What tuning chose."""
    rows = []
    for variant in stage.variants:
        cells = [_setting(study, case, variant.name) for case in stage.cases]
        if any(cells):
            rows.append([variant.name, *cells])
    if not rows:
        return []
    tied = [study.title(case) for case in stage.cases if study.tasks[case.task].tied]
    note = f" {tied[0]}'s embedding is tied: its multiple is the head's too." if tied else ""
    return [
        "Learning rate, beta1, the embedding's multiple of the rate, and of those that have them look-ahead's c and "
        f"gamma. (end): the last value offered.{note}",
        "",
        *table(["", *(label(study, case) for case in stage.cases)], rows),
    ]


def _setting(study: Study, case: Case, name: str) -> str:
    variant = BY_NAME[name]
    try:
        setting = study.best(case, variant)
    except Missing:
        return ""
    axes = [axis for axis in variant.axes if axis not in case.fixed]
    ends = at_end(setting, axes)
    shown = {"rate": f"{setting.lr * variant.lr_scale:.2g}", "embedding": f"x {2.0**setting.embedding:g}"}
    parts = [
        shown.get(axis, f"{_short(axis)}{getattr(setting, axis):.2g}") + (" (end)" if axis in ends else "")
        for axis in variant.axes
    ]
    return ", ".join(parts)


def _short(axis: str) -> str:
    return {"lookahead": "c ", "gamma": "gamma "}.get(axis, "")


def lasting(study: Study, by_task: Mapping[str, Sequence[Case]], what: str) -> list[str]:
    """The gain over AdamW against length or size, and in the last column whether it lasts, once all of it is there."""
    gains = {
        (task, variant.name, case): against(study, case, variant.name, ADAMW)
        for task, cases in by_task.items() for variant in CORE if variant.name != ADAMW
        for case in finished(study, cases, [ADAMW, variant.name])
    }  # fmt: skip
    if not gains:
        return []
    clear = dict(zip(gains, analysis.holm(list(gains.values())), strict=True))
    rows = []
    for task, name in dict.fromkeys((task, name) for task, name, _ in gains):
        cells = [(task, name, case) for case in by_task[task]]
        worth = ""
        if all(cell in gains for cell in cells):
            worth = analysis.trend(gains[cells[0]], gains[cells[-1]]) + _saved(study, gains[cells[-1]], by_task[task])
        shown = [show(gains[cell], clear[cell]) if cell in gains else "" for cell in cells]
        rows.append([study.tasks[task].title, name, *shown, worth])
    multiples = [case.size if case.size > 1 else case.length for case in next(iter(by_task.values()))]
    head = ["task", "", *(f"{multiple}x {what}" for multiple in multiples), "the gain, and what it is worth"]
    return table(head, rows)


def _saved(study: Study, gain: Difference, cases: Sequence[Case]) -> str:
    """What a clear gain is worth in steps, by the fall of AdamW's loss from the last length but one to the last.

    Between sizes there is no such thing.
    """
    before, last = cases[-2:]
    ends = [loss(study, case, ADAMW) for case in (before, last)]
    share = analysis.saved(gain, ends[0], ends[1], factor=last.length / before.length)
    return f", {share:.0%} of the steps" if last.size == 1 and gain.clear and not math.isnan(share) else ""


def label(study: Study, case: Case) -> str:
    """A case in a table's head."""
    size = f", {case.size}x parameters" if case.size > 1 else ""
    return study.title(case) + size


def alphas(study: Study) -> list[str]:
    """alpha in the short runs' finals: the mean over the steps, and the largest of any step and seed."""
    rows = []
    cases = protocol.ONE.cases
    for variant in VARIANTS:
        cells = []
        for case in cases:
            results = study.finals(case, variant) if study.has(case, variant) else []
            cells.append(_alpha(results))
        if any(cells):
            rows.append([variant.name, *cells])
    if not rows:
        return []
    head = ["", *(study.title(case) for case in cases)]
    return ["Mean over the steps, and the largest of any step and seed.", "", *table(head, rows)]


def _alpha(results: Sequence[Result]) -> str:
    means = [result.alpha_mean for result in results if result.alpha_mean is not None]
    peaks = [result.alpha_peak for result in results if result.alpha_peak is not None]
    return f"{fmean(means):.2f}, {max(peaks):.2f}" if means and max(peaks) > 1 else ""


def counterexample(study: Study, name: str) -> list[str]:
    """Where it ends, by learning rate."""
    task = next(task for task in study.counterexamples if task.name == name)
    rates, rows = counterexamples.RATES[name], []
    try:
        for variant in VARIANTS:
            ends = [fmean(result.final for result in study.ends(task, variant, rate)) for rate in rates]
            rows.append([variant.name, *(f"{end:.3g}" if math.isfinite(end) else "diverged" for end in ends)])
    except Missing:
        return []
    seeds = len(protocol.COUNTEREXAMPLE_SEEDS)
    caption = f"{task.measure.capitalize()}, mean of {seeds} seeds, by learning rate (a variant's scale comes to it)."
    return [caption, "", *table(["", *(f"{Setting(rate).lr:.2g}" for rate in rates)], rows)]


def fill(page: Path, tables: Tables) -> list[str]:
    """Put tables into a page, between ``<!-- table: TITLE -->`` and ``<!-- end -->``. Returns the titles it asked for.

    A table that is not there yet leaves what the page has.
    """
    asked: list[str] = []

    def put(found: re.Match[str]) -> str:
        asked.append(found[1])
        rows = tables.get(found[1])
        return found[0] if rows is None else "\n".join([f"<!-- table: {found[1]} -->", *rows, "<!-- end -->"])

    page.write_text(re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", put, page.read_text(), flags=re.DOTALL))
    return asked
