"""The picture of a run: loss curves side by side, and what the paper's rule did at each step."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from alphaadam_dist.files import naming
from alphaadam_dist.training.metrics import Entry

_COLORS = {"AlphaAdam": "#d1495b", "look-ahead": "#edae49", "AdamW": "#30638e"}
INK = "#2b2d42"
GREY = "#5c677d"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": "#8d99ae",
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#edf0f5",
    "grid.linewidth": 1.0,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}


def plot_run(logs: dict[str, list[Entry]], subtitle: str, path: Path, *, loss: str = "loss, nats a token") -> None:
    """Draw the logs of AlphaAdam and what is beside it (name -> entries) into a PNG.

    `loss` names the loss and its unit.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.6), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        grid = figure.add_gridspec(2, 2, width_ratios=[1.75, 1])
        losses = figure.add_subplot(grid[:, 0])
        alpha = figure.add_subplot(grid[0, 1])
        agreement = figure.add_subplot(grid[1, 1], sharex=alpha)
        figure.suptitle(f"{', '.join(logs)}: {subtitle}", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
        _draw_losses(losses, logs, loss)
        _draw_series(alpha, logs["AlphaAdam"], "alpha", "boost of the agreeing coordinates")
        _draw_series(agreement, logs["AlphaAdam"], "agreement", "gradients with their momentum's sign")
        agreement.set_xlabel("step")
        with naming(path):
            figure.savefig(path)


def _draw_losses(axes: Axes, logs: dict[str, list[Entry]], title: str) -> None:
    final = []
    for name, entries in logs.items():
        color = _COLORS[name]
        train = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        held_out = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.35, linewidth=1.2, label=f"{name}, training")
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), color=color, linewidth=2.2, marker="o", markersize=4.5,
                label=f"{name}, held out",
            )  # fmt: skip
            final.append((held_out[-1], name))
    # Right of the curves; the lowest gets its number lower, the highest higher, so that close finishes stay readable.
    for rank, ((step, loss), name) in enumerate(sorted(final)):
        axes.annotate(
            f"{loss:.3f}", (step, loss), xytext=(8, 10 * rank - 5 * (len(final) - 1)), textcoords="offset points",
            va="center", color=_COLORS[name], fontweight="bold",
        )  # fmt: skip
    axes.set(title=title, xlabel="step")
    axes.margins(x=0.04)
    axes.set_xlim(right=axes.get_xlim()[1] + 0.06 * (axes.get_xlim()[1] - axes.get_xlim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")


def _draw_series(axes: Axes, entries: list[Entry], key: str, meaning: str) -> None:
    points = [(e["step"], e[key]) for e in entries if key in e]
    axes.plot(*zip(*points, strict=True), color=_COLORS["AlphaAdam"], linewidth=1.6)
    axes.set_title(key)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(meaning, loc="right", fontsize=9, fontweight="normal", color=GREY)
