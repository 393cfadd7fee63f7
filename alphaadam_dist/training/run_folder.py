"""The folder of a run: a fresh one for every start, the last one for `--resume`, and never two trainings in one."""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alphaadam_dist.files import sentence
from alphaadam_dist.training import metrics
from alphaadam_dist.training.settings import FILE_NAME, OPTIMIZERS, SavedSettings, Settings

PICTURE_NAME = "losses.png"

_DEFAULT_ROOT = Path("runs")
_LOCK_NAME = ".lock"


@contextmanager
def open_run(out: Path | None, resume: bool, settings: Settings) -> Iterator[Path]:
    """Yield the folder to train in, locked while the context lasts.

    Without `out` runs are numbered: `runs/train-1`, `runs/train-2` and so on, and `resume` takes the newest, or starts
    the first. A start that fails before anything was trained or logged leaves no folder.

    Raises ValueError where the folder is another program's, is in use, or cannot be made or written to, or where
    `resume` finds no run in `out`.
    """
    run = out or _numbered(resume)
    with _naming_out(run):
        used = _used(run)
        if used and not resume:
            raise ValueError(
                f"--out {run} is not empty: add --resume to go on with the run in it, or choose another --out"
            )
        if resume and out is not None and not used:
            raise _nothing_to_resume(run)
        if used and not (run / FILE_NAME).exists():
            raise ValueError(f"--out {run} has {used[0]} and no {FILE_NAME}, so it is no run: choose another --out")
        if used:
            settings.read(run)  # before anything is written there
    with _locked(run, run):
        if (run / FILE_NAME).exists():
            settings.check_resumes(run)
        else:
            settings.save(run)
        yield run


@contextmanager
def open_optimizer_folder(run: Path, optimizer: str, resume: bool, settings: SavedSettings) -> Iterator[Path]:
    """Yield RUN/OPTIMIZER to train in, locked while the context lasts.

    Other optimizers' folders may be there already. A later optimizer is refused where its settings are not those of the
    first. A start that fails leaves nothing, and raises ValueError, as in `open_run`.
    """
    folder = run / optimizer
    with _naming_out(run):
        if resume and not any(_used(each) for each in (run, folder)):
            raise _nothing_to_resume(run)
        if (folder / metrics.FILE_NAME).exists() and not resume:
            raise ValueError(f"{folder} has a training already: add --resume to go on with it, or choose another --out")
        if (run / FILE_NAME).exists():
            # a start that failed before its first step leaves settings behind; the next start may have others
            begun = any((run / name / metrics.FILE_NAME).exists() for name in OPTIMIZERS)
            settings.check_resumes(run) if begun else settings.read(run)
        elif (run / PICTURE_NAME).exists() or any(_used(run / name) for name in OPTIMIZERS):
            raise ValueError(
                f"--out {run} has {PICTURE_NAME} or a folder {' or '.join(OPTIMIZERS)} and no {FILE_NAME}, so they "
                "are not a recipe's: choose another --out"
            )
    with _locked(folder, run):
        settings.save(run)
        yield folder


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    with _naming_out(out):
        new = [path for path in (out, *out.parents) if not path.exists()]
        fresh = not any(_used(path) for path in (out, folder))
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK_NAME, "a")  # noqa: SIM115  (it stays open as long as the training lasts)
    with lock:
        with _naming_out(out):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"a training is still running in {folder}: wait for it, or choose another --out"
                ) from None
        try:
            yield
        except BaseException:
            if fresh:
                _remove_start(out, new)
            raise


def _remove_start(out: Path, new: list[Path]) -> None:
    """Remove what a failed start has made, `new` folders among it, unless there is more: a log or results."""
    more = (path for path in out.rglob("*") if path.is_file() and path.stat().st_size and path.name != FILE_NAME)
    with suppress(OSError):  # it is the error before this one that counts
        if any(more):
            return
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in new:
            path.rmdir()


def _nothing_to_resume(run: Path) -> ValueError:
    return ValueError(f"--out {run} has no run to go on with: check the path, or leave out --resume to start one there")


@contextmanager
def _naming_out(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--out {out} cannot be used, {sentence(error)}") from None


def _used(folder: Path) -> list[str]:
    """What is in a folder, apart from what a start that failed at once leaves there."""
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(name for name in found if name != _LOCK_NAME and not name.startswith(f"{FILE_NAME}.partial"))


def _numbered(resume: bool) -> Path:
    numbers = [int(m[1]) for path in _DEFAULT_ROOT.glob("train-*") if (m := re.fullmatch(r"train-(\d+)", path.name))]
    last = max(numbers, default=0)
    return _DEFAULT_ROOT / f"train-{max(last, 1) if resume else last + 1}"
