"""The log of a run, one JSON object a line: what was measured at which step."""

import json
import os
from pathlib import Path
from typing import Any

from alphaadam_dist.files import naming, write_whole

FILE_NAME = "metrics.jsonl"
_TAIL_BYTES = 4096

Entry = dict[str, Any]


def append(path: Path, entry: Entry) -> None:
    """Add one entry at the end. Raises OSError, naming the file, also where the disk is full."""
    with naming(path), open(path, "a") as log:
        log.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[Entry]:
    """All entries; a last line cut short by a kill is left out. Raises ValueError where another is damaged."""
    return _parse(path, path.read_bytes()) if path.exists() else []


def read_last(path: Path) -> list[Entry]:
    """The last few entries, at a cost that does not grow with the log."""
    if not path.exists():
        return []
    with open(path, "rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - _TAIL_BYTES))
        tail = log.read()
    return _parse(path, tail if size <= _TAIL_BYTES else tail.partition(b"\n")[2])


def truncate(path: Path, step: int) -> None:
    """Drop what was logged after `step`, so that a resumed run does not log a step twice."""
    kept = [entry for entry in read(path) if entry["step"] <= step]
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _parse(path: Path, log: bytes) -> list[Entry]:
    complete = log[: log.rfind(b"\n") + 1]
    return [_entry(path, line) for line in complete.splitlines()]


def _entry(path: Path, line: bytes) -> Entry:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise ValueError(
            f"{path} has a line that is no log entry, {line[:60].decode(errors='replace')!r}: remove the line, or "
            "start afresh with another --out"
        )
    return entry
