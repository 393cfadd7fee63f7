"""The pictures of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from alphaadam_dist.training.plots import GREY, INK, STYLE

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from . import analysis, protocol
from .protocol import Done, Study
from .trial import Task
from .variants import ADAMW, ALPHAADAM, BY_NAME, Variant

Value = Callable[[Task, Variant, float, Done], float]

# the few that the line plots show, so that a line can be told from another
COLORS = {
    ADAMW: "#30638e",
    ALPHAADAM: "#d1495b",
    "AlphaAdam tau 1/9": "#edae49",
    "AlphaAdam gamma 0.5": "#9a6fb0",
    "C-AdamW": "#3a9d6e",
    "CMGUP": "#00798c",
    "random mask": "#8d99ae",
    "Lion": "#6b4f3a",
    "AlphaLion": "#e07a1f",
}


def draw(stem: Path, study: Study) -> list[Path]:
    """Write the pictures beside ``stem`` and return where they are. Of a sweep cut short, those that can be drawn."""
    pictures = {
        "differences": (_differences, "finals"),
        "training": (_training, "finals"),
        "rates": (_rates, "screening"),
        "counterexamples": (_counterexamples, protocol.COUNTEREXAMPLES),
    }
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, (draw_one, made_by) in pictures.items():
            finished = study.finished(made_by)
            if finished and len(finished) == len(study.tasks_of(made_by)):
                paths.append(_save(draw_one(study, finished), stem, name))
    return paths


def _lines(study: Study) -> list[tuple[str, str]]:
    """Name and color of what the line plots show."""
    return [(variant.name, COLORS[variant.name]) for variant in study.variants if variant.name in COLORS]


def _save(figure: Figure, stem: Path, name: str) -> Path:
    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.savefig(path)
    return path


def _panels(all_of: Sequence[Task], height: float, title: str, *, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """One for each task, with its title."""
    figure = Figure(
        figsize=(3.1 * len(all_of) + 1.2, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    )
    panels = figure.subplots(1, len(all_of), sharey=share_y, squeeze=False)[0]
    for axes, task in zip(panels, all_of, strict=True):
        axes.set_title(task.title, fontsize=10.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return figure, list(panels)


def _differences(study: Study, all_of: Sequence[Task]) -> Figure:
    """Every optimizer's difference to AdamW with its interval, a panel a task."""
    names = [variant.name for variant in study.variants if variant.name != ADAMW][::-1]
    figure, panels = _panels(
        all_of, 5.2, "held-out loss minus AdamW's, nats: mean of 5 paired seeds and 95 % interval", share_y=True
    )
    for axes, task in zip(panels, all_of, strict=True):
        for row, name in enumerate(names):
            difference = analysis.against(task, name, ADAMW, study.done)
            if math.isnan(difference.mean):
                axes.annotate("diverged", (0, row), color=GREY, fontsize=8.5, va="center")
                continue
            color = "#d1495b" if name.startswith("Alpha") else "#30638e"
            axes.errorbar(
                difference.mean, row, xerr=difference.half, fmt="o", color=color, markersize=6, capsize=3,
                markerfacecolor=color if difference.clear else "white", linewidth=1.6,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(names)), names)
    panels[0].set_xlabel("filled: the interval leaves 0 out", fontsize=9, color=GREY)
    return figure


def _training(study: Study, all_of: Sequence[Task]) -> Figure:
    """How the difference to AdamW goes over training."""
    figure, panels = _panels(all_of, 4.0, "held-out loss minus AdamW's over training, nats: mean of 5 paired seeds")
    for axes, task in zip(panels, all_of, strict=True):
        for name, color in _lines(study):
            if name == ADAMW:
                continue
            points = analysis.gain_over_training(task, name, study.done)
            axes.plot([s for s, _ in points], [d.mean for _, d in points], color=color, label=name, linewidth=1.8)
        axes.axhline(0, color=COLORS[ADAMW], linewidth=1.4)
        axes.set_xlabel("step")
    _legend(figure, panels)
    return figure


def _rates(study: Study, all_of: Sequence[Task]) -> Figure:
    """Screening: loss against learning rate."""
    figure, panels = _panels(
        all_of, 4.0, "held-out loss by learning rate, one seed (Lion at half of it, AlphaLion at a quarter)"
    )
    for axes, task in zip(panels, all_of, strict=True):
        _over_rates(axes, study, task, protocol.screened)
    _legend(figure, panels)
    return figure


def _counterexamples(study: Study, all_of: Sequence[Task]) -> Figure:
    """The last measure by learning rate, a panel a problem."""
    figure, panels = _panels(all_of, 4.2, "counterexamples: where it ends, by learning rate; lower is better")
    for axes, task in zip(panels, all_of, strict=True):
        _over_rates(axes, study, task, analysis.ends)
        axes.set_yscale("linear" if task.name == "reddi" else "log")
        axes.minorticks_off()
        axes.set_ylabel(task.measure)
    _legend(figure, panels)
    return figure


def _over_rates(axes: Axes, study: Study, task: Task, value: Value) -> None:
    """A line for each optimizer over the task's learning rates."""
    for name, color in _lines(study):
        values = [value(task, BY_NAME[name], rate, study.done) for rate in task.rates]
        axes.plot(task.rates, values, color=color, label=name, marker="o", markersize=3.5, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_xticks(task.rates, [f"{rate:g}" for rate in task.rates], fontsize=8.5)
    axes.minorticks_off()
    axes.set_xlabel("learning rate")


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=9 if len(panels) > 3 else 5, fontsize=9)
