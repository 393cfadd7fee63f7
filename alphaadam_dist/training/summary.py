"""What a finished run tells the person who started it: the numbers, the verdict, and what the model writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from alphaadam_dist.training.metrics import Entry

_PROMPTS = ("def main(", '"""Return the', "import ")
_NEW_TOKENS = 40


def print_losses(console: Console, logs: dict[str, list[Entry]]) -> None:
    """A table of the last losses, and in one sentence which optimizer came out ahead.

    Where the held-out loss was measured before the first step, it stands beside the last one.
    """
    before = {name: _before(entries, "eval_loss") for name, entries in logs.items()}
    held_out = {name: final_held_out(entries) for name, entries in logs.items()}
    columns = ["", "held-out loss", "perplexity", "training loss", "steps"]
    if None not in before.values():
        columns.insert(1, "before")
    table = _table(columns)
    for name, entries in logs.items():
        loss = held_out[name]
        train = [entry["loss"] for entry in entries if "loss" in entry]
        perplexity = torch.tensor(loss, device="cpu").exp().item()
        row = [name, f"{loss:.4f}", f"{perplexity:.1f}", f"{train[-1]:.4f}", str(entries[-1]["step"])]
        if None not in before.values():
            row.insert(1, f"{before[name]:.4f}")
        table.add_row(*row)
    console.print(table)
    if len(held_out) > 1:
        console.print(_verdict(held_out), highlight=False, soft_wrap=True)


def print_scores(console: Console, logs: dict[str, list[Entry]], scores: Sequence[str]) -> None:
    """A table of an evaluation's metrics, before the first step and after the last."""
    table = _table(["", *(f"{score}{when}" for score in scores for when in (" before", ""))])
    for name, entries in logs.items():
        row = []
        for score in scores:
            measured = [entry[f"eval_{score}"] for entry in entries if f"eval_{score}" in entry]
            before = _before(entries, f"eval_{score}")
            row += ["" if before is None else f"{before:.4f}", f"{measured[-1]:.4f}"]
        table.add_row(name, *row)
    console.print(table)


def _table(columns: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def _before(entries: list[Entry], measure: str) -> float | None:
    return next((float(entry[measure]) for entry in entries if measure in entry and entry["step"] == 0), None)


def final_held_out(entries: list[Entry]) -> float:
    """The held-out loss at the end of the run. Raises ValueError where the log has none."""
    losses = [float(entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    if not losses:
        raise ValueError("the log of this run has no held-out loss: restore it, or start afresh with another --out")
    return losses[-1]


def _verdict(held_out: dict[str, float]) -> str:
    (first, lowest), *others = sorted(held_out.items(), key=lambda item: item[1])
    apart = [f"{loss - lowest:.4f} below {name}" if loss > lowest else f"level with {name}" for name, loss in others]
    return f"{first} ends {' and '.join(apart)} on held-out text. This is one seed: see benchmarks/ for more."


def print_samples(console: Console, checkpoint: Path) -> None:
    """A few lines the model writes, from a checkpoint, always the same for the same weights."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto")
    set_seed(0)
    for prompt in _PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        written = model.generate(**tokens, max_new_tokens=_NEW_TOKENS, do_sample=True, temperature=0.7, top_k=40)
        lines = tokenizer.decode(written[0][tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        console.print(f"[bold]{escape(prompt)}[/bold]{escape(str(lines))}", highlight=False)
        console.print()
