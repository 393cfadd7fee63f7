"""What killed runs leave behind goes at the next start, and only where no process can use it any more."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from alphaadam_dist.torch_versions import numbers
from alphaadam_dist.training import compilations, leftovers, main_job
from alphaadam_dist.training.start_ranks import LaunchError
from recipes.run import Epochs, Lr, Out, Recipe, Training, WeightDecay, command
from tests.recipes.test_run_folder import SETTINGS


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a compilation leaves it that was killed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(leftovers, "_in_container", lambda kind: False)
    monkeypatch.setattr(leftovers, "_file_system", lambda path: "ext4")
    left = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    left.parent.mkdir(parents=True)
    left.touch()
    return left


def cleared() -> str:
    said: list[str] = []
    leftovers.clear(said.append)
    return "\n".join(said)


@contextmanager
def process(code: str, *arguments: object, seconds: float = 60, cwd: Path | None = None) -> Iterator[None]:
    """Another process that does something, says so, and stays for a while."""
    code = f"import os, sys, time, mmap; {code}; print('ready', flush=True); time.sleep({seconds})"
    line = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=cwd) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        yield
        started.kill()


def test_a_lock_of_a_killed_compilation_goes(lock: Path) -> None:
    assert cleared() == f"Removed {lock}, left by a run that was killed while it compiled."
    assert os.listdir(lock.parent) == []
    assert cleared() == ""


def test_other_folders_than_deepspeeds_are_left_alone(lock: Path) -> None:
    other = lock.parent.with_name("flash_attn") / "lock"
    other.parent.mkdir()
    other.touch()
    cleared()
    assert other.exists()


def test_in_torchs_own_folder(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    moved = tmp_path / "cache" / "torch_extensions" / "py311_cpu" / "cpu_adam" / "lock"
    moved.parent.mkdir(parents=True)
    lock.rename(moved)
    assert str(moved) in cleared()
    assert not moved.exists()


def test_a_lock_that_a_process_holds_stays(lock: Path) -> None:
    with process("held = os.open(sys.argv[1], os.O_RDONLY)", lock):
        assert "compiles deepspeed_shm_comm for DeepSpeed: this run waits for it" in cleared()
        assert lock.exists()


def test_compilers_that_outlive_their_run_are_awaited(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with process("pass", seconds=1, cwd=lock.parent):
        assert "Removed" in cleared()
    lock.touch()
    monkeypatch.setattr(leftovers, "_PATIENCE", 0.0)
    with process("pass", cwd=lock.parent):
        assert cleared().endswith(f"when they have ended, remove {lock}")
        assert lock.exists()


@pytest.mark.parametrize("where", ["another machine", "another user", "another container"])
def test_a_lock_that_may_be_anothers_is_named_within_seconds(
    lock: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "another machine":
        monkeypatch.setattr(leftovers, "_file_system", lambda path: "nfs4")
    elif where == "another user":
        monkeypatch.setattr(leftovers, "_is_ours", lambda path: False)
    else:
        monkeypatch.setattr(leftovers, "_in_container", lambda kind: True)
    assert cleared().startswith(f"{lock} makes DeepSpeed wait for a compilation")
    assert lock.exists()


def test_file_systems_are_told_apart() -> None:
    assert leftovers._file_system(Path("/proc/self/mounts")) == "proc"
    assert leftovers._file_system(Path(__file__)) != ""


def test_buffers_of_dead_ranks_go(lock: Path) -> None:
    shm = leftovers.SHARED_MEMORY
    shm.mkdir()
    names = {name: shm / f"{leftovers.BUFFER}_{os.getuid()}_127.0.0.1_{name}_0" for name in ("dead", "open", "mapped")}
    others = [shm / f"{leftovers.BUFFER}_{os.getuid() + 1}_127.0.0.1_29500_0", shm / "psm_something"]
    for path in (*names.values(), *others):
        path.write_bytes(bytes(4096))
    hold = (
        "held = os.open(sys.argv[1], os.O_RDWR); fd = os.open(sys.argv[2], os.O_RDWR); "
        "there = mmap.mmap(fd, 4096); os.close(fd)"
    )
    with process(hold, names["open"], names["mapped"]):
        assert cleared().startswith("Removed")  # of the lock alone is told
        assert {path.name for path in shm.iterdir()} == {p.name for p in (names["open"], names["mapped"], *others)}
    cleared()
    assert {path.name for path in shm.iterdir()} == {path.name for path in others}


def test_a_container_with_the_machines_shared_memory_leaves_it_alone(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftovers.SHARED_MEMORY.mkdir()
    left = leftovers.SHARED_MEMORY / f"{leftovers.BUFFER}_{os.getuid()}_127.0.0.1_29500_0"
    left.touch()
    monkeypatch.setattr(leftovers, "_in_container", lambda kind: kind == "pid")
    cleared()
    assert left.exists()


def test_a_rank_that_opens_its_buffer_meanwhile_keeps_it(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftovers.SHARED_MEMORY.mkdir()
    left = leftovers.SHARED_MEMORY / f"{leftovers.BUFFER}_{os.getuid()}_127.0.0.1_29500_0"
    left.write_text("mine")
    used = leftovers._used
    answers: Iterator[Any] = iter([set])  # the first look is before the rank opens it
    monkeypatch.setattr(leftovers, "_used", lambda: next(answers, used)())
    with left.open():
        leftovers._clear_buffers()
    assert {path.name: path.read_text() for path in left.parent.iterdir()} == {left.name: "mine"}


@pytest.mark.skipif(numbers(version("deepspeed")) < (0, 19), reason="older ones have fewer, in other files")
def test_the_names_are_deepspeeds() -> None:
    sources = Path(next(iter(find_spec("deepspeed").submodule_search_locations or [])), "ops")
    named = "".join(path.read_text() for path in (sources / "op_builder").rglob("*.py"))
    assert [name for name in leftovers.OPERATORS if f'NAME = "{name}"' not in named] == []
    assert f'#define SHM_BUFFER_NAME "{leftovers.BUFFER}"' in (sources / "csrc/cpu/comm/shm.cpp").read_text()


# ---- who calls it


def test_the_main_job_clears_before_it_starts_the_ranks(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[bool] = []
    monkeypatch.setattr(main_job, "launch", lambda *_: there.append(lock.exists()))
    console = Console(record=True, width=500)
    for zero, fsdp in ((2, False), (None, True)):
        lock.touch()
        with pytest.raises(LaunchError, match="ended before step"):  # nobody has trained
            main_job.train_one(console, tmp_path, "alphaadam", replace(SETTINGS, zero=zero, fsdp=fsdp))
    assert there == [False, True]  # FSDP needs none of DeepSpeed's operators
    assert f"Removed {lock}" in console.export_text()


def test_the_recipes_clear_before_they_train(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[bool] = []
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "",
        "MASTER_PORT": "",
    }.items():
        monkeypatch.setenv(name, value)  # which the recipe does, too

    @dataclass(frozen=True, kw_only=True)
    class Small(Recipe):
        lr: Lr = 1e-3
        weight_decay: WeightDecay = 0.0
        epochs: Epochs = 1.0
        out: Out = tmp_path / "out"

    def main(options: Small, training: Training) -> None:
        """Nothing."""
        there.append(lock.exists())

    config = tmp_path / "ds.json"
    config.write_text("{}")
    result = CliRunner().invoke(command(Small, main), ["--deepspeed", str(config)])
    assert result.exit_code == 0, result.output
    assert there == [False]
    assert "Removed" in result.output


# ---- compilations


def announced(lock: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(compilations, "_LOOK_SECONDS", 0.01)
    said: list[str] = []
    with compilations.announced(said.append):
        time.sleep(0.3)
    return said


def test_the_first_compilation_is_announced_once(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = announced(lock, monkeypatch)
    assert said.startswith("DeepSpeed compiles its operator deepspeed_shm_comm, once on this machine")


def test_no_compilation_is_announced_where_the_operator_is_there(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lock.parent / "deepspeed_shm_comm.so").touch()
    assert announced(lock, monkeypatch) == []
    lock.unlink()
    (lock.parent / "deepspeed_shm_comm.so").unlink()
    assert announced(lock, monkeypatch) == []


def test_the_main_job_announces_it(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilations, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(leftovers, "clear", lambda say: None)
    monkeypatch.setattr(main_job, "launch", lambda *_: time.sleep(0.3))
    console = Console(record=True, width=200)
    for settings in (SETTINGS, replace(SETTINGS, zero=None, fsdp=True)):
        with pytest.raises(LaunchError):  # nothing was trained
            main_job.train_one(console, tmp_path, "alphaadam", settings)
    assert console.export_text().count("DeepSpeed compiles its operator deepspeed_shm_comm") == 1
