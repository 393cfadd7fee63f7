"""Files that people, other programs and full disks have their hands on: every error names the file and what to do."""

import errno
import json
import os
import re
import resource
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

_CHUNK = 1 << 24
_PROBE = 1 << 20
_THREADS = 4
_WHAT_TO_DO = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota there",
    errno.EFBIG: "allow larger files there (ulimit -f)",
    errno.EACCES: "change who may read and write there, or give another path",
    errno.EPERM: "change who may read and write there, or give another path",
    errno.EROFS: "give a path that can be written to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file; give another path",
    errno.EEXIST: "give another path",
    errno.EISDIR: "give a file, not a folder",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EIO: "the disk or its connection is failing",
}


def sentence(error: OSError) -> str:
    """What the system refused, with the file and what to do about it."""
    if error.errno is None or error.strerror is None:
        return str(error)
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes, Path)) else ""
    what_to_do = f": {_WHAT_TO_DO[error.errno]}" if error.errno in _WHAT_TO_DO else ""
    return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}{what_to_do}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError that has none: the system names what it could not open, not what it could not fill."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all. Raises OSError, which names it."""
    partial = path.with_name(f"{path.name}.partial{os.getpid()}")
    with naming(path):
        try:
            partial.write_text(text)
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink()


def read_json(path: Path, what_to_do: str) -> Any:
    """What a JSON file holds. Raises ValueError, which ends with ``what_to_do``, and OSError."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or no JSON ({error}): {what_to_do}") from None


def read_object(path: Path, what_to_do: str) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError, which ends with ``what_to_do``, and OSError."""
    held = read_json(path, what_to_do)
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a JSON {type(held).__name__} where an object belongs: {what_to_do}")
    return held


def size_and_checksum(path: Path) -> list[int] | None:
    """Bytes and CRC-32 of a file; None where it cannot be read."""
    size = checksum = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                checksum = zlib.crc32(chunk, checksum)
    except OSError:
        return None
    return [size, checksum]


def measure(folder: Path, names: list[str]) -> dict[str, list[int] | None]:
    """``size_and_checksum`` of each of these files, several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: size_and_checksum(folder / name), names), strict=True))


def digest(path: Path, names: list[str] | None = None) -> str:
    """A name for what a file holds, or a folder in these files, or in all that are not hidden. Reads all of it.

    Raises OSError where a file cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    if names is None:
        names = visible(path) if path.is_dir() else [path.name]
    measured = measure(folder, names)
    for name, found in measured.items():
        if found is None:
            raise OSError(errno.EACCES, "cannot be read", str(folder / name))
    return sha256(json.dumps(sorted(measured.items())).encode(errors="replace")).hexdigest()[:16]


def visible(folder: Path) -> list[str]:
    """The files in a folder, of which no part of the name is hidden, in order."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [name.as_posix() for name in found if not any(part.startswith(".") for part in name.parts)]


def what_stops_writing(folder: Path, said: str = "") -> OSError | None:
    """What the system says to a program that writes into the folder, for libraries that keep it to themselves.

    It names the file that was written last. ``said`` is the library's own message: those in Rust end with the system's
    number. None where that has none and a megabyte finds room now.
    """
    last, size = _written_last(folder)
    number = re.search(r"\(os error (\d+)\)", said)
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])), str(last))
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and size >= limit:
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(last))
    probe = folder / f".probe{os.getpid()}"
    try:
        probe.write_bytes(bytes(_PROBE))
    except OSError as error:
        return OSError(error.errno, error.strerror, str(last))
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def _written_last(folder: Path) -> tuple[Path, int]:
    found = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # another rank may have renamed it
            known = path.stat()
            if path.is_file():
                found.append((known.st_mtime, path, known.st_size))
    return max(found)[1:] if found else (folder, 0)
