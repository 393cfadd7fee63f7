"""Which checkpoint to go on from: the last one that every rank finished writing."""

import re
from pathlib import Path

_MARKER = "complete"


def mark_complete(checkpoint: Path) -> None:
    """Say that every file of the checkpoint is written; call it once every rank is done."""
    (checkpoint / _MARKER).touch()


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint in the folder. A kill while saving leaves one without a marker: skipped."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{_MARKER}")]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """The step a checkpoint was taken at; 0 for none."""
    if checkpoint is None:
        return 0
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if found is None:
        raise ValueError(f"{checkpoint} is not a checkpoint folder: its name must be checkpoint-STEP")
    return int(found[1])
