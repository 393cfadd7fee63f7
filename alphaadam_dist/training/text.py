"""Where local text is, and a name for what it holds. No heavy import: the command line asks before anything starts."""

import sys
import sysconfig
from pathlib import Path

from alphaadam_dist.files import digest, visible

STDLIB = "stdlib"
# Installed packages are not the standard library, and tests and generated tables are poor reading.
_STDLIB_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data",
    "turtledemo", "ensurepip", "__phello__",
}  # fmt: skip


def standard_library() -> tuple[Path, list[str]]:
    """Its folder, and the files of Python source in it."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    return root, [name.as_posix() for name in names if not _STDLIB_SKIPPED.intersection(name.parts)]


def texts(folder: Path) -> list[str]:
    """The files of text in a folder."""
    return [name for name in visible(folder) if is_text((folder / name).read_bytes())]


def is_text(content: bytes) -> bool:
    """Whether it is text, in any encoding that has no zero bytes."""
    return b"\0" not in content


def digest_of_data(data: str | Path | None) -> str | None:
    """A name for the text that `data` means, the standard library or local files; None for an id of a hub."""
    if data == STDLIB:
        return sys.version
    path = Path(data) if data is not None else None
    return digest(path, texts(path)) if path is not None and path.is_dir() else digest_of_place(data)


def digest_of_place(place: str | Path | None) -> str | None:
    """A name for what a file or a whole folder holds; None for an id of a hub."""
    return digest(Path(place)) if place is not None and Path(place).exists() else None
