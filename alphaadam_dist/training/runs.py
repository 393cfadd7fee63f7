"""The folder of a run: a fresh one for every start, the last one for `--resume`, and never two trainings in one."""

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alphaadam_dist.training import metrics
from alphaadam_dist.training.settings import FILE_NAME, SavedSettings, Settings

_DEFAULT_ROOT = Path("runs")
_LOCK_NAME = ".lock"


@contextmanager
def open_run(out: Path | None, resume: bool, settings: Settings) -> Iterator[Path]:
    """Yield the folder to train in, locked while the context lasts.

    Without `out` runs are numbered: `runs/train-1`, `runs/train-2` and so on, and `resume` takes the newest.
    """
    run = out or _numbered(resume)
    if not resume and run.is_dir() and any(path.name != _LOCK_NAME for path in run.iterdir()):
        raise ValueError(f"--out {run} is not empty: add --resume to go on with the run in it, or choose another --out")
    with _locked(run):
        if (run / FILE_NAME).exists():
            settings.check_resumes(run)
        else:
            settings.save(run)
        yield run


@contextmanager
def open_half(run: Path, optimizer: str, resume: bool, settings: SavedSettings) -> Iterator[Path]:
    """Yield RUN/OPTIMIZER to train in, locked while the context lasts; the other optimizer's may be there already.

    Both are trained with the same settings, or the second is refused.
    """
    folder = run / optimizer
    if (folder / metrics.FILE_NAME).exists() and not resume:
        raise ValueError(f"{folder} has a training already: add --resume to go on with it, or choose another --out")
    if any(run.glob(f"*/{metrics.FILE_NAME}")):
        settings.check_resumes(run)
    with _locked(folder):
        settings.save(run)
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK_NAME, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"a training is still running in {folder}: wait for it, or choose another --out") from None
        yield


def _numbered(resume: bool) -> Path:
    numbers = [int(m[1]) for path in _DEFAULT_ROOT.glob("train-*") if (m := re.fullmatch(r"train-(\d+)", path.name))]
    last = max(numbers, default=0)
    return _DEFAULT_ROOT / f"train-{max(last, 1) if resume else last + 1}"
