"""The table that ``alphaadam verify`` prints on rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .run import STEPS, Row


def show(console: Console, rows: Sequence[Row], device: torch.device, left_out: Sequence[str]) -> None:
    """Print one line a row, then why rows failed and what was not tried."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title=f"AlphaAdam after {STEPS} steps, {dist.get_world_size()} ranks on {device.type}, against one process",
        caption="deviation: relative L2 over all parameters; calls, bytes: collectives of a step beyond AdamW's",
    )
    for heading in ("sharding", "setting", "deviation", "AdamW's", "calls", "bytes", "ms", "AdamW's", ""):
        table.add_column(heading, justify="left" if heading in ("sharding", "setting", "") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.sharding, row.setting, f"{row.deviation:.1e}", f"{row.adamw_deviation:.1e}", f"{row.collectives:g}",
            f"{row.bytes:g}", f"{1e3 * row.seconds:.1f}", f"{1e3 * row.adamw_seconds:.1f}",
            "[red]FAILED[/red]" if row.problems else "[green]same[/green]",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        for problem in row.problems:
            console.print(f"[red]{escape(row.sharding)}, {row.setting}:[/red] {escape(problem)}")
    if left_out:
        console.print(f"Not tried: {escape(', '.join(left_out))}")
    failed = sum(bool(row.problems) for row in rows)
    if failed:
        console.print(f"[red]{failed} of {len(rows)} rows failed.[/red]")
    else:
        console.print(f"Counts and alpha are the same on all ranks in all {len(rows)} rows.")
