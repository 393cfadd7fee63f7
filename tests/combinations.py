"""Writes docs/combinations.md from what the tests are parametrized with: `python -m tests.combinations`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.cells import Cell, refused, served
from tests.equality import given, test_awkward, test_rounding
from tests.zero import (
    test_auto_ep,
    test_combined,
    test_equality,
    test_experts,
    test_offload,
    test_pipeline,
    test_refusals,
    test_tensor_parallel,
)

PAGE = Path(__file__).parents[1] / "docs" / "combinations.md"
HEAD = """# What can be combined

Written by `python -m tests.combinations` from the parameters of the tests, so that every cell is a test's; one of them
compares this page with them. *served*: one process's bits with given gradients. *refused*: AlphaAdam stops at the
start, with the reason. *not in DeepSpeed*: DeepSpeed ends in an error of its own, with torch's AdamW too, which a test
sees. An empty cell was not tried.
"""
Table = Mapping[str, Mapping[str, Cell]]


def of_deepspeed() -> Table:
    """Rows are settings, columns stages."""
    table: dict[str, dict[str, Cell]] = {}
    for mode in test_equality.MODES:
        stage, _, variant = mode.removeprefix("zero").partition("-")
        dtype, _, more = variant.partition("-") if variant[:4] in ("bf16", "fp16") else ("fp32", "-", variant)
        table.setdefault(", ".join(filter(None, (dtype, more.replace("-", " ")))), {})[stage] = served()
    for module in (test_offload, test_combined, test_tensor_parallel, test_pipeline, test_auto_ep, test_experts):
        for row, cells in module.CELLS.items():
            table[row] = {str(stage): cell for stage, cell in cells.items()}
    for name, (config, says) in test_refusals.CONFIGS.items():
        row, stage = name.removesuffix(" at stage 3"), str(config["zero_optimization"]["stage"])
        table.setdefault(row, {}).setdefault(stage, refused(says, ""))
    return table


def of_torch() -> Table:
    """Rows are shardings, columns what the optimizer is told."""
    table: dict[str, dict[str, Cell]] = {}
    for name in (*given.REGIMES, *given.FURTHER):
        row = table[name.replace("-", " ")] = {"exact, delayed, by layer": served()}
        if name in test_awkward.CLIPPED:
            row["clip_norm"] = served()
        if name in test_rounding.KNOWN:
            row["bf16 state"] = served()
        if name in test_rounding.UNKNOWN:
            row["bf16 state"] = refused("", "nobody knows where an element stands in its parameter")
    return table


def lines(table: Table, columns: Sequence[str], first: str) -> Iterator[str]:
    yield f"| {first} | {' | '.join(columns)} |"
    yield "|" + "---|" * (len(columns) + 1)
    for row, cells in table.items():
        yield f"| {row} | {' | '.join(text(cells.get(column)) for column in columns)} |"


def text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    verdict = {"impossible": "not in DeepSpeed"}.get(cell.verdict, cell.verdict)
    return f"{verdict}: {cell.because}" if cell.because else verdict


def page() -> str:
    parts = [
        HEAD,
        "## DeepSpeed\n",
        "Why something is refused: [deepspeed.md](deepspeed.md#what-is-refused).\n",
        *lines(of_deepspeed(), ["0", "1", "2", "3"], "at ZeRO stage"),
        "\n## PyTorch\n",
        *lines(of_torch(), ["exact, delayed, by layer", "clip_norm", "bf16 state"], "sharding"),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
