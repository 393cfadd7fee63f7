"""The table that ``alphaadam verify`` prints on rank 0."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .run import STEPS, Row

CAPTION = (
    "deviation: L2 distance from one process's parameters, as a share of the way that they went. calls, bytes: "
    "collectives of a step beyond AdamW's. All rows are on the fast kernels, but for 'reference'. 'threshold' clips, "
    "too, 'look-ahead' has no masks. 'bf16' and 'offload' are a model in bf16, 'offload' with the step on the CPU. "
    "Ulysses, AutoTP, AutoEP and PipelineModule (its ms have forward and backward) are over pairs of ranks, at "
    "ZeRO-1; 'pipeline 2 x 2' is torch's over pairs, two parts a rank. AutoEP and 'EP 2 x FSDP2' train experts. "
    "AdamW is torch's, one tensor at a time."
)
NEVER = "NVMe offload, fp16, parameters in 16 bits without fp32 masters, accumulated gradients, CUDA graphs, your model"
"""What the library serves and ``alphaadam verify`` never runs."""


def show(console: Console, rows: Sequence[Row], device: torch.device, left_out: Sequence[str]) -> None:
    """Print one line a row, then why rows failed and what was not tried."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
        title=f"AlphaAdam after {STEPS} steps, {dist.get_world_size()} ranks on {device.type}, against one process",
        caption=CAPTION,
        caption_justify="left",
    )
    for heading in ("sharding", "setting", "deviation", "AdamW's", "calls", "bytes", "ms", "AdamW's", ""):
        table.add_column(heading, justify="left" if heading in ("sharding", "setting", "") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.sharding, row.setting, f"{row.deviation:.1e}", f"{row.adamw_deviation:.1e}", str(row.collectives),
            str(row.bytes), f"{1e3 * row.seconds:.1f}", f"{1e3 * row.adamw_seconds:.1f}",
            "[red]FAILED[/red]" if row.problems else "[green]same[/green]",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        for problem in row.problems:
            console.print(f"[red]{escape(row.sharding)}, {row.setting}:[/red] {escape(problem)}", soft_wrap=True)
    if left_out:
        console.print(f"Not tried here: {escape(', '.join(left_out))}", soft_wrap=True)
    never = NEVER if device.type == "cpu" else f"{NEVER}, context parallel"
    console.print(f"Never tried: {never}", soft_wrap=True)
    failed = sum(bool(row.problems) for row in rows)
    if failed:
        console.print(f"[red]{failed} of {len(rows)} rows failed.[/red]")
    else:
        console.print(f"Counts and alpha are the same on all ranks in all {len(rows)} rows.")
