"""Which checkpoint to go on from: the last one that is whole, and whose files are still as they were written.

torch.load, through which DeepSpeed and DCP read, takes a file with a flipped bit without a word. So once every rank has
written its part, size and CRC-32 of every file are recorded in the checkpoint, and compared before anything is loaded.
Reading is shared between the ranks where there are several.

Nothing here deletes. What a run began to write and did not finish is renamed, and so is what it recorded and what is
damaged now. A checkpoint that no run here has begun or recorded belongs to somebody else, and stays as it is.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alphaadam_dist.files import measure, sentence, what_stops_writing, write_whole
from alphaadam_dist.training.reasons import Explained

_MARKER = "complete"
_BEGUN = ".alphaadam-saving"

_writing: set[Path] = set()
"""What this process has begun to write and not finished."""


class SaveFailed(Explained):
    """A checkpoint could not be written."""


def begin(checkpoint: Path) -> None:
    """Note beside a checkpoint that it is about to be written, so that half of it is known as this run's own.

    Called on every rank. A folder that is there already is not noted: what is in it may be somebody else's.
    """
    _writing.add(checkpoint.absolute())
    if _rank() == 0 and not checkpoint.exists():
        write_whole(checkpoint.parent / _BEGUN, checkpoint.name)


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
        write_whole(checkpoint / _MARKER, json.dumps(measured, indent=1))
        if _begun(checkpoint.parent) == checkpoint.name:
            (checkpoint.parent / _BEGUN).unlink()
    _writing.discard(checkpoint.absolute())


def is_marked(checkpoint: Path) -> bool:
    """Whether it was once complete."""
    return (checkpoint / _MARKER).is_file()


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


def choose(folder: Path) -> Path | None:
    """``last_complete``, unless a run that goes on from there would come to write over somebody else's checkpoint.

    Raises:
        ValueError: a newer checkpoint was not written under ``CheckpointMarker``.
    """
    chosen = last_complete(folder)
    strange = [name for name in strangers(folder) if step_of(folder / name) > step_of(chosen)]
    if strange:
        raise ValueError(
            f"{folder} has {', '.join(strange)} without a file {_MARKER}: nothing tells whether they are whole, and "
            "a run that starts before them would write over them. Record the one to go on from with checkpoints."
            f"mark_complete(Path({str(folder / strange[0])!r})), move them elsewhere, or choose another folder"
        )
    return chosen


def take_up(folder: Path) -> Path | None:
    """``choose``, after which newer checkpoints of this run, unfinished or damaged ones, are out of the way.

    They are renamed to set-aside-...: the Trainer would write into them, and counts them among those it keeps.

    Raises:
        ValueError: as ``choose``. Nothing is renamed then.
    """
    chosen = choose(folder)
    if _rank() == 0:
        for path in _newest_first(folder):
            if step_of(path) > step_of(chosen):
                _set_aside(path)
        (folder / _BEGUN).unlink(missing_ok=True)
    return chosen


def _set_aside(checkpoint: Path) -> None:
    aside, n = checkpoint.with_name(f"set-aside-{checkpoint.name}"), 1
    while aside.exists():
        n += 1
        aside = checkpoint.with_name(f"set-aside-{checkpoint.name}-{n}")
    checkpoint.rename(aside)
    warnings.warn(f"{checkpoint} is now {aside.name}: remove it when you do not need it", stacklevel=3)


def strangers(folder: Path) -> list[str]:
    """The checkpoints in the folder that were neither recorded nor begun by a run under ``CheckpointMarker``."""
    names: list[str] = _as_first_rank(lambda: [path.name for path in _newest_first(folder) if _is_strange(path)])
    return names


def _is_strange(checkpoint: Path) -> bool:
    return not is_marked(checkpoint) and checkpoint.name != _begun(checkpoint.parent)


def _begun(folder: Path) -> str | None:
    """The name of the checkpoint that a run has begun to write and not finished."""
    try:
        return (folder / _BEGUN).read_text(errors="replace").strip()
    except (FileNotFoundError, IsADirectoryError):
        return None


@contextmanager
def naming_failed_saves(folder: Path) -> Iterator[None]:
    """Turn an error while a checkpoint is written into one that names the checkpoint and what the system refused.

    What was written of it stays, and ``take_up`` sets it aside. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        half = next((path for path in _writing if path.parent == folder.absolute() and path.exists()), None)
        _writing.clear()
        if half is None:
            raise
        untouched = "Earlier checkpoints are untouched: --resume goes on from the last, and sets this one aside"
        refused = _refused(error, half)
        if refused is None:
            raise RuntimeError(f"{folder / half.name} could not be written: {error}. {untouched}") from error
        raise SaveFailed(f"{folder / half.name} could not be written: {refused}. {untouched}") from error


def _refused(error: BaseException | None, checkpoint: Path) -> str | None:
    """What the system refused, if that is what was wrong: libraries tell it as an OSError, as its cause, or not.

    A sentence, because a frame that kept the error would keep the half-written file open.
    """
    stopped = what_stops_writing(checkpoint, str(error))
    while error is not None:
        if isinstance(error, OSError):
            return sentence(error if error.filename is not None or stopped is None else stopped)
        error = error.__cause__ or error.__context__
    return None if stopped is None else sentence(stopped)


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
        recorded = json.loads((checkpoint / _MARKER).read_bytes())
    except FileNotFoundError:
        return f"it was not finished, it has no file named {_MARKER}"
    except (ValueError, RecursionError, OSError) as error:
        return f"{_MARKER} is damaged or cannot be read ({error})"
    if not isinstance(recorded, dict) or not all(_is_measure(found) for found in recorded.values()):
        return f"{_MARKER} is damaged, it is not a record of files"
    if not recorded and any(path.name != _MARKER for path in checkpoint.iterdir()):
        return f"{_MARKER} is damaged, it records none of the files"
    return recorded


def _is_measure(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 2 and all(type(number) is int for number in found)


def _measure(checkpoint: Path, names: list[str]) -> dict[str, list[int] | None]:
    """Size and CRC-32 of each file, None where it cannot be read. Each rank reads its share."""
    measured = measure(checkpoint, names[_rank() :: _ranks()])
    if not dist.is_initialized():
        return measured
    shares: list[Any] = [None] * _ranks()
    dist.all_gather_object(shares, measured)
    return {name: found for share in shares for name, found in share.items()}


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
