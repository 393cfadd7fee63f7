"""The log of a run, one JSON object a line: what was measured at which step."""

import json
import os
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"
_TAIL_BYTES = 4096

Entry = dict[str, Any]


def append(path: Path, entry: Entry) -> None:
    """Add one entry at the end. Raises OSError, naming the file, also where the disk is full."""
    try:
        with open(path, "a") as log:
            log.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read(path: Path) -> list[Entry]:
    """All entries; a last line cut short by a kill is left out."""
    return _parse(path.read_bytes()) if path.exists() else []


def read_last(path: Path) -> list[Entry]:
    """The last few entries, at a cost that does not grow with the log."""
    if not path.exists():
        return []
    with open(path, "rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - _TAIL_BYTES))
        tail = log.read()
    return _parse(tail if size <= _TAIL_BYTES else tail.partition(b"\n")[2])


def truncate(path: Path, step: int) -> None:
    """Drop what was logged after `step`, so that a resumed run does not log a step twice."""
    kept = [entry for entry in read(path) if entry["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    os.replace(partial, path)


def _parse(log: bytes) -> list[Entry]:
    complete = log[: log.rfind(b"\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]
