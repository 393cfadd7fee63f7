"""The progress bar of a run, drawn from its log: the ranks write, and this process only reads."""

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import Self

from alphaadam_dist.training import metrics

_PLAIN_LINES = 10


class TrainingProgress:
    """A bar with loss, learning rate, alpha and agreement; ten plain lines where the output is no terminal."""

    def __init__(self, console: Console, label: str, log: Path, steps: int) -> None:
        self._console, self._label, self._log, self._steps = console, label, log, steps
        self._printed = 0
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(f"{label:<9}", total=steps, numbers="starting")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self) -> None:
        """Show the newest entry of the log."""
        entry: metrics.Entry = {}
        for later in metrics.read_last(self._log):
            if "loss" in later or "eval_loss" in later:
                entry |= later
        if "loss" not in entry:
            return
        step, numbers = entry["step"], _numbers(entry)
        self._bar.update(self._task, completed=step, numbers=numbers)
        tenth = step * _PLAIN_LINES // self._steps
        if not self._console.is_terminal and tenth > self._printed:
            self._printed = tenth
            self._console.print(f"{self._label:<9} {step:>6}/{self._steps}  {numbers}", highlight=False, soft_wrap=True)


def _numbers(entry: metrics.Entry) -> str:
    parts = [f"loss {entry['loss']:.3f}"]
    if "eval_loss" in entry:
        parts.append(f"held-out {entry['eval_loss']:.3f}")
    parts.append(f"lr {entry['learning_rate']:.1e}")
    if "alpha" in entry:
        parts.append(f"alpha {entry['alpha']:.2f}")
    if "agreement" in entry:
        parts.append(f"agreement {entry['agreement']:.2f}")
    return "  ".join(parts)
