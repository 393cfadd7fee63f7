"""Checkpoint files of the main job: what is damaged is found and never loaded, and a save that fails says where."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from alphaadam_dist.training import checkpoints, metrics
from alphaadam_dist.training.settings import FILE_NAME, Settings
from tests.ranks import RankError, Ranks

STEPS = 4  # a checkpoint after each; the last two are kept


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write on (EFBIG) behind this many bytes of any file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def job(run: str, cache: str, largest: int | None = None) -> list[str]:
    """One rank of the main job, in a process that has imported everything; the warnings it gave."""
    from alphaadam_dist.training.rank import train
    from tests.hf.trainer import clean

    with clean(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        os.environ["ALPHAADAM_CACHE"] = cache
        with largest_file(largest) if largest else nullcontext():
            train(Path(run), "alphaadam", threading.Event())
    return [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def finished(ranks2: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A main job that ran to its end at ZeRO-2 on two ranks."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(Path(json.__file__).parent, root / "text", ignore=shutil.ignore_patterns("__pycache__"))
    run = root / "run"
    (run / "alphaadam").mkdir(parents=True)
    Settings(
        model="tiny-llama", data=str(root / "text"), zero=2, fsdp=False, offload=False, steps=STEPS, gpus=2, lr=3e-3,
        batch=2, block=32, seed=0,
    ).save(run)  # fmt: skip
    ranks2.run(job, str(run), str(root / "cache"))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def cache_of(finished: Path) -> str:
    return str(finished.parent / "cache")


def curve(run: Path) -> list[tuple[int, float, float]]:
    entries = metrics.read(run / "alphaadam" / metrics.FILE_NAME)
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip(path: Path, at: float = 0.5) -> None:
    held = bytearray(path.read_bytes())
    held[int(at * (len(held) - 1))] ^= 1
    path.write_bytes(held)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_to_any_file_is_found(run: Path, damage: Callable[[Path], None]) -> None:
    folder = run / "alphaadam"
    last = folder / f"checkpoint-{STEPS}"
    assert checkpoints.last_complete(folder) == last
    names = [path.relative_to(last) for path in files_of(last)]
    assert {"complete", "trainer_state.json", "model.safetensors"} <= {str(name) for name in names}
    assert sum("optim_states" in name.name for name in names) == 2
    for name in names:
        whole = (last / name).read_bytes()
        damage(last / name)
        # a damaged record accuses other files, so of it only the folder is asked
        named = "" if name.name == "complete" else re.escape(str(name))
        with pytest.warns(UserWarning, match=rf"skipping \S+checkpoint-{STEPS}: .*{named}"):
            assert checkpoints.last_complete(folder) == folder / f"checkpoint-{STEPS - 1}", name
        (last / name).write_bytes(whole)
    assert checkpoints.last_complete(folder) == last


@pytest.mark.slow
def test_the_job_goes_on_from_the_last_good_checkpoint(finished: Path, run: Path, ranks2: Ranks) -> None:
    """A bit flipped in the moments of the second rank, which DeepSpeed itself would load."""
    folder = run / "alphaadam"
    last = folder / f"checkpoint-{STEPS}"
    damaged = next(last.rglob("zero_pp_rank_1_*optim_states.pt"))
    flip(damaged)
    told, silent = ranks2.run(job, str(run), cache_of(finished))
    assert any(damaged.name in warning and "checksum" in warning for warning in told)
    assert not any(damaged.name in warning for warning in silent)
    assert curve(run) == curve(finished)
    assert checkpoints.last_complete(folder) == last
    assert (folder / f"set-aside-{last.name}" / damaged.relative_to(last)).exists()


@pytest.mark.slow
def test_a_save_that_fails_names_the_path_and_loses_nothing(finished: Path, run: Path, ranks2: Ranks) -> None:
    """The system refuses to write on (EFBIG) in the middle of each rank's optimizer state."""
    folder = run / "alphaadam"
    last = folder / f"checkpoint-{STEPS}"
    shutil.rmtree(last)
    with pytest.raises(RankError) as failure:
        ranks2.run(job, str(run), cache_of(finished), largest=5 << 20)
    said = rf"SaveFailed: {re.escape(str(last))} could not be written: \S+: file too large: allow larger files there"
    assert re.search(said, str(failure.value))
    with pytest.warns(UserWarning, match="it was not finished"):
        assert checkpoints.last_complete(folder) == folder / f"checkpoint-{STEPS - 1}"
    half = [path.relative_to(last) for path in files_of(last)]
    assert half
    ranks2.run(job, str(run), cache_of(finished))
    assert curve(run) == curve(finished)
    aside = folder / f"set-aside-{last.name}"
    assert [path.relative_to(aside) for path in files_of(aside)] == half


def fresh(run: Path, finished: Path) -> Path:
    (run / "alphaadam").mkdir(parents=True)
    shutil.copy(finished / FILE_NAME, run)
    return run / "alphaadam"


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_named(finished: Path, tmp_path: Path, ranks1: Ranks) -> None:
    folder = fresh(tmp_path / "run", finished)
    (folder / "checkpoint-2").touch()
    with pytest.raises(RankError, match=re.escape(str(folder / "checkpoint-2"))):
        ranks1.run(job, str(tmp_path / "run"), cache_of(finished))
    assert checkpoints.last_complete(folder) == folder / "checkpoint-1"


@pytest.mark.slow
def test_a_full_and_a_read_only_disk(finished: Path, tmp_path: Path, ranks1: Ranks) -> None:
    """On a real file system of 32 MB, with room for one checkpoint."""
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        folder = fresh(run, finished)
        half = folder / "checkpoint-2"
        with pytest.raises(RankError, match=rf"{half} could not be written: {half}/\S+: no space left on device: make"):
            ranks1.run(job, str(run), cache_of(finished))
        with pytest.warns(UserWarning, match="checkpoint-2: it was not finished"):
            assert checkpoints.last_complete(folder) == folder / "checkpoint-1"
        shutil.copytree(run, tmp_path / "saved")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(RankError, match=rf"Read-only file system: '{re.escape(str(folder))}"):
            ranks1.run(job, str(run), cache_of(finished))
    finally:
        subprocess.run(["umount", disk], check=True)
    ranks1.run(job, str(tmp_path / "saved"), cache_of(finished))
    assert [step for step, _, _ in curve(tmp_path / "saved")] == list(range(1, STEPS + 1))
