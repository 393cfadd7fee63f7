"""What a benchmark says of its rows: a table, which bars hold, and what moved since the last run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.turns import FUSED, Row


def show(console: Console, rows: Sequence[Row], memory: dict[str, float]) -> None:
    """Print one line a row."""
    table = Table(title="a step, median of paired ratios", box=None, header_style="bold", pad_edge=False)
    for heading in ("case", "", "ms", "against", "ratio", "middle half", "bar", "GB/s", "of copy"):
        table.add_column(heading, justify="left" if heading in ("case", "", "against") else "right")
    for row in rows:
        met = "" if row.bar is None else f"{'green' if row.ratio <= row.bar else 'red'}"
        ratio = f"{row.ratio:.3f}" if not met else f"[{met}]{row.ratio:.3f}[/{met}]"
        table.add_row(
            row.case, row.name, f"{row.milliseconds:.2f}", row.against, ratio,
            f"{row.spread[0]:.2f} to {row.spread[1]:.2f}", "" if row.bar is None else f"{row.bar:.2f}",
            "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.1f}",
            "" if row.share_of_copy is None else f"{row.share_of_copy:.0%}",
        )  # fmt: skip
    console.print(table)
    for name, megabytes in memory.items():
        console.print(f"{name}: {megabytes:.2f} MB at the peak of a step beyond what was there", highlight=False)


def judge(
    console: Console, rows: Sequence[Row], memory: Mapping[str, float], most: float, seconds: Mapping[str, float]
) -> None:
    """Say which bars hold, also of memory, no more than ``most`` MB above fused AdamW, and of ``seconds``: below 1."""
    judged = {f"{row.case}, {row.name}": (row.ratio, row.bar) for row in rows if row.bar is not None}
    judged |= {name: (took, 1.0) for name, took in seconds.items()}
    for name, megabytes in memory.items():
        if name != FUSED:
            judged[f"{name}, MB above {FUSED}"] = (megabytes - memory[FUSED], most)
    missed = {name: pair for name, pair in judged.items() if pair[0] > pair[1]}
    console.print(f"{len(judged) - len(missed)} of {len(judged)} bars hold", highlight=False)
    for name, (value, bar) in missed.items():
        console.print(f"  not held: {name}: {value:.3f}, bar {bar:.2f}", highlight=False)


def beside_last(console: Console, rows: Sequence[Row], last: Path | None) -> None:
    """Say which ratios moved since the run in that file: those whose middle halves do not touch."""
    if last is None:
        console.print("there is no earlier run to compare with", highlight=False)
        return
    before = {(row["case"], row["name"]): row for row in json.loads(last.read_text())["rows"]}
    pairs = [(row, before[row.case, row.name]) for row in rows if (row.case, row.name) in before]
    moved = [(row, old) for row, old in pairs if row.spread[0] > old["spread"][1] or row.spread[1] < old["spread"][0]]
    console.print(f"of {len(pairs)} ratios that {last.name} has too, {len(moved)} moved", highlight=False)
    for row, old in moved:
        console.print(f"  {row.case}, {row.name}: {old['ratio']:.3f} then, {row.ratio:.3f} now", highlight=False)
