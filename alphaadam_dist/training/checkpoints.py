"""Which checkpoint to go on from: the last one that is whole, and whose files are still as they were written.

torch.load, through which DeepSpeed and DCP read, takes a file with a flipped bit without a word. So once every rank has
written its part, size and CRC-32 of every file are recorded in the checkpoint, and compared before anything is loaded.
Reading is shared between the ranks where there are several.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

_MARKER = "complete"
_CHUNK = 1 << 24
_THREADS = 4


def mark_complete(checkpoint: Path) -> None:
    """Record every file of a checkpoint, once every rank has written its part. Collective where there are ranks.

    Raises:
        ValueError: a rank cannot read a file that the first one sees.
    """
    if dist.is_initialized():
        dist.barrier()
    files = _as_first_rank(lambda: sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()))
    measured = _measure(checkpoint, [name for name in files if not name.startswith(_MARKER)])
    for name, found in measured.items():
        if found is None:
            raise ValueError(
                f"{checkpoint / name} cannot be read by every rank: save on a file system that all nodes share"
            )
    if _rank() == 0:
        partial = checkpoint / f"{_MARKER}.partial"
        partial.write_text(json.dumps(measured, indent=1))
        os.replace(partial, checkpoint / _MARKER)


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint in the folder that is whole. Reads all of it; collective where there are ranks.

    Newer ones that were not finished or are damaged are skipped, with a warning that names the file.
    """
    for name in _as_first_rank(lambda: [path.name for path in _newest_first(folder)]):
        wrong = _what_is_wrong(folder / name)
        if wrong is None:
            return folder / name
        if _rank() == 0:
            warnings.warn(f"skipping {folder / name}: {wrong}", stacklevel=2)
    return None


def take_up(folder: Path) -> Path | None:
    """``last_complete``, after which newer checkpoints, that is unfinished or damaged ones, are out of the way.

    They are renamed to set-aside-...: the Trainer counts every checkpoint folder among those it keeps, and would remove
    the good one first.
    """
    chosen = last_complete(folder)
    if _rank() == 0:
        for path in _newest_first(folder):
            if step_of(path) > step_of(chosen):
                aside = path.with_name(f"set-aside-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    return chosen


@contextmanager
def naming_failed_saves(folder: Path) -> Iterator[None]:
    """Turn an error while a checkpoint is written into one that names the checkpoint.

    What was written of it is removed: on a full disk the error itself needs the room.
    """
    try:
        yield
    except Exception as error:
        newest = next(iter(_newest_first(folder)), None)
        if newest is None or (newest / _MARKER).exists():
            raise
        shutil.rmtree(newest, ignore_errors=True)
        raise RuntimeError(
            f"{newest} could not be written: {error}. Check the room and the permissions there; earlier checkpoints "
            "are untouched, and --resume goes on from the last"
        ) from error


def step_of(checkpoint: Path | None) -> int:
    """The step a checkpoint was taken at; 0 for none."""
    if checkpoint is None:
        return 0
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if found is None:
        raise ValueError(f"{checkpoint} is not a checkpoint folder: its name must be checkpoint-STEP")
    return int(found[1])


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*/") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def _what_is_wrong(checkpoint: Path) -> str | None:
    recorded = _as_first_rank(lambda: _read_marker(checkpoint))
    if isinstance(recorded, str):
        return recorded
    for name, found in _measure(checkpoint, sorted(recorded)).items():
        if found is None:
            return f"{name} is missing or cannot be read"
        if found[0] != recorded[name][0]:
            return f"{name} has {found[0]} bytes, {recorded[name][0]} were written"
        if found != recorded[name]:
            return f"{name} is damaged, its checksum is not that of what was written"
    return None


def _read_marker(checkpoint: Path) -> dict[str, list[int]] | str:
    """What was recorded, or what is wrong with the record."""
    try:
        recorded: dict[str, list[int]] = json.loads((checkpoint / _MARKER).read_text())
    except FileNotFoundError:
        return f"it was not finished, it has no file named {_MARKER}"
    except ValueError:
        return f"{_MARKER} is damaged"
    return recorded


def _measure(checkpoint: Path, names: list[str]) -> dict[str, list[int] | None]:
    """Size and CRC-32 of each file, None where it cannot be read. Each rank reads its share."""
    with ThreadPoolExecutor(_THREADS) as pool:
        mine = names[_rank() :: _ranks()]
        measured = dict(zip(mine, pool.map(lambda name: _size_and_checksum(checkpoint / name), mine), strict=True))
    if not dist.is_initialized():
        return measured
    shares: list[Any] = [None] * _ranks()
    dist.all_gather_object(shares, measured)
    return {name: found for share in shares for name, found in share.items()}


def _size_and_checksum(path: Path) -> list[int] | None:
    size = checksum = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                checksum = zlib.crc32(chunk, checksum)
    except OSError:
        return None
    return [size, checksum]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _as_first_rank(look: Callable[[], Any]) -> Any:
    """What the first rank sees, on every rank: a shared file system may show the others something older."""
    if not dist.is_initialized():
        return look()
    seen = [look() if _rank() == 0 else None]
    dist.broadcast_object_list(seen)
    return seen[0]
