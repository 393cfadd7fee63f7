"""The pictures of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from alphaadam_dist.training.plots import GREY, INK, STYLE

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from . import report
from .protocol import FOUR, ITS_OPTIONS, ONE, OTHERS, Stage, Study
from .variants import ADAMW, ALPHAADAM, BOTH, LOOKAHEAD, NADAMW

# the few that the line plots show, so that a line can be told from another
COLORS = {
    ADAMW: "#30638e",
    NADAMW: "#3a9d6e",
    ALPHAADAM: "#d1495b",
    LOOKAHEAD: "#edae49",
    BOTH: "#9a6fb0",
    "CMGUP": "#00798c",
}


def draw(stem: Path, study: Study) -> list[Path]:
    """Write the pictures beside ``stem`` and return where they are: those that have something to show."""
    pictures = {"four-times": FOUR, "short": ONE, "options": ITS_OPTIONS, "peers": OTHERS}
    with matplotlib.rc_context(STYLE):
        figures = {name: _differences(study, stage) for name, stage in pictures.items() if stage in study.stages}
        figures["lasting"] = _lasting(study)
        return [_save(figure, stem, name) for name, figure in figures.items() if figure is not None]


def _save(figure: Figure, stem: Path, name: str) -> Path:
    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.savefig(path)
    return path


def _panels(titles: Sequence[str], height: float, title: str, *, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """One for each title."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(3.1 * len(titles) + 1.2, height), dpi=150, layout=layout)
    panels = figure.subplots(1, len(titles), sharey=share_y, squeeze=False)[0]
    for axes, of_panel in zip(panels, titles, strict=True):
        axes.set_title(of_panel, fontsize=10.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return figure, list(panels)


def _differences(study: Study, stage: Stage) -> Figure | None:
    """Every optimizer's difference to AdamW with its interval, a panel a task; of whole tasks alone."""
    names = [variant.name for variant in stage.variants if variant.name != ADAMW][::-1]
    cases = report.finished(study, stage.cases, [ADAMW, *names])
    if not cases:
        return None
    title = f"{stage.title}: held-out loss minus AdamW's, nats, and 95 % interval"
    titles = [report.label(study, case) for case in cases]
    figure, panels = _panels(titles, 1.6 + 0.24 * len(names), title, share_y=True)
    for axes, case in zip(panels, cases, strict=True):
        for row, name in enumerate(names):
            difference = report.against(study, case, name, ADAMW)
            if math.isnan(difference.mean):
                axes.annotate("diverged", (0, row), color=GREY, fontsize=8.5, va="center")
                continue
            color = "#d1495b" if "Alpha" in name or "look" in name else "#30638e"
            axes.errorbar(
                difference.mean, row, xerr=difference.half, fmt="o", color=color, markersize=6, capsize=3,
                markerfacecolor=color if difference.clear else "white", linewidth=1.6,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    panels[0].set_xlabel("filled: the interval leaves 0 out", fontsize=9, color=GREY)
    return figure


def _lasting(study: Study) -> Figure | None:
    """The gain over AdamW against length, and against size."""
    kinds = [(study.tasks[task].title, "steps", cases) for task, cases in report.LENGTHS.items() if task in study.tasks]
    kinds += [
        (f"{study.tasks[task].title}, larger models", "parameters and steps", cases)
        for task, cases in report.SIZES.items() if task in study.tasks
    ]  # fmt: skip
    lines = [(kind, name, report.finished(study, kind[2], [ADAMW, name])) for kind in kinds for name in COLORS]
    lines = [(kind, name, cases) for kind, name, cases in lines if name != ADAMW and len(cases) > 1]
    if not lines:
        return None
    kinds = [kind for kind in kinds if any(of_line is kind for of_line, _, _ in lines)]
    title = "Does the gain last? Held-out loss minus AdamW's, nats"
    figure, panels = _panels([kind[0] for kind in kinds], 4.0, title)
    for axes, kind in zip(panels, kinds, strict=True):
        axes.set_xlabel(f"times the {kind[1]}")
        axes.axhline(0, color=COLORS[ADAMW], linewidth=1.4)
        axes.set_xscale("log", base=4)
        axes.set_xticks([1, 4, 16], ["1", "4", "16"])
    for kind, name, cases in lines:
        at = [case.size if case.size > 1 else case.length for case in cases]
        gains = [report.against(study, case, name, ADAMW) for case in cases]
        panels[kinds.index(kind)].errorbar(
            at, [gain.mean for gain in gains], yerr=[gain.half for gain in gains], color=COLORS[name], label=name,
            linewidth=1.8, marker="o", markersize=4, capsize=2,
        )  # fmt: skip
    _legend(figure, panels)
    return figure


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=8, fontsize=9)
