"""Starting the ranks: the command line, its failures, and ranks that end with the process that started them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from alphaadam_dist.rank_failures import RankLost
from alphaadam_dist.training import reasons, tie
from alphaadam_dist.training.start_ranks import LaunchError, Stopped, command, free_port, launch
from tests.recipes.test_run_folder import SETTINGS


def test_the_command_line_is_deepspeeds_own(tmp_path: Path):
    line = command(tmp_path, "adamw", replace(SETTINGS, gpus=3))
    assert Path(line[0]).name == "deepspeed"
    assert line[1:3] == ["--num_gpus", "3"]
    assert line[-4:] == ["--module", "alphaadam_dist.training.rank", str(tmp_path), "adamw"]


def test_fsdp_is_started_by_torchrun(tmp_path: Path):
    line = command(tmp_path, "alphaadam", replace(SETTINGS, zero=None, fsdp=True, gpus=3))
    assert Path(line[0]).name == "torchrun"
    assert line[1:6] == ["--standalone", "--nproc-per-node", "3", "--max-restarts", "1"]
    assert line[-4:] == ["--module", "alphaadam_dist.training.rank", str(tmp_path), "alphaadam"]


def test_a_failure_without_a_reason_shows_the_end_of_the_log_and_its_path(tmp_path: Path):
    failing = [sys.executable, "-c", "print('\\n'.join(f'line {i}' for i in range(99))); raise SystemExit(3)"]
    with pytest.raises(LaunchError) as failure:
        launch(failing, tmp_path, SETTINGS, lambda: None)
    assert "no rank told why" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert str(tmp_path / "train.log") in str(failure.value)
    assert "line 98" in failure.value.tail
    assert "line 50" not in failure.value.tail
    assert (tmp_path / "train.log").read_text().splitlines() == [f"line {i}" for i in range(99)]


@pytest.fixture
def telling(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The command of a process that writes what a rank writes when it meets these errors."""

    def command(*errors: Exception, then: str = "sys.exit(1)") -> list[str]:
        for error in errors:
            reasons.tell(error)
        return [sys.executable, "-c", f"import sys, time; print({capsys.readouterr().err!r}, flush=True); {then}"]

    return command


FULL = OSError(28, "No space left on device", "/disk/checkpoint-2/model.safetensors")


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ([FULL], "/disk/checkpoint-2/model.safetensors: no space left on device: make room there"),
        ([ValueError("--data has 3 blocks:\n  give more text")], "--data has 3 blocks: give more text"),
        ([RankLost("not heard from: rank 1"), FULL, ValueError("later")], ": make room there"),
        ([RankLost("not heard from: rank 1")], "not heard from: rank 1"),
        ([ZeroDivisionError("by zero")], "ZeroDivisionError: by zero"),
    ],
)
def test_the_reason_is_the_last_thing_in_one_line(
    telling: Callable[..., list[str]], tmp_path: Path, errors: list[Exception], reason: str
):
    """A rank's own reason goes before one that another rank's end gave it."""
    with pytest.raises(LaunchError) as failure:
        launch(telling(*errors), tmp_path, SETTINGS, lambda: None)
    message = str(failure.value)
    assert "\n" not in message
    assert message.endswith(reason)
    assert f"training in {tmp_path} failed" in message
    assert failure.value.tail == ""
    assert "Traceback" not in message


def test_the_reason_comes_through_where_the_log_itself_finds_no_room(telling: Callable[..., list[str]], tmp_path: Path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    with pytest.raises(LaunchError, match=r"no space left on device: make room there$"):
        launch(telling(FULL), tmp_path, SETTINGS, lambda: None)


def test_a_rank_that_was_killed_is_named_by_its_signal(tmp_path: Path):
    said = "print('process 7 exits with return code = -9'); import sys; sys.exit(247)"
    with pytest.raises(LaunchError, match="a rank was ended by SIGKILL"):
        launch([sys.executable, "-c", said], tmp_path, SETTINGS, lambda: None)


def test_what_a_rank_did_wrong_by_itself_is_not_tried_again(telling: Callable[..., list[str]], tmp_path: Path):
    """The launcher would: it is ended. Where ranks lost each other it may."""
    started = time.monotonic()
    with pytest.raises(LaunchError, match=r"a setting$"):
        launch(telling(ValueError("a setting"), then="time.sleep(100)"), tmp_path, SETTINGS, lambda: None)
    assert time.monotonic() - started < 20
    launch(telling(RankLost("rank 1"), then="time.sleep(1)"), tmp_path, SETTINGS, lambda: None)


def test_an_interrupt_ends_the_ranks(tmp_path: Path):
    def interrupt() -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch([sys.executable, "-c", "import time; time.sleep(100)"], tmp_path, SETTINGS, interrupt)
    assert time.monotonic() - started < 20


@pytest.mark.slow
@pytest.mark.parametrize(("code", "saved"), [(0, True), (3, False)])
def test_sigterm_reaches_the_ranks_through_their_standard_input(tmp_path: Path, code: int, saved: bool):
    rank = (
        "import os, sys, threading; from alphaadam_dist.training.rank import listen; asked = threading.Event(); "
        "threading.Thread(target=listen, args=(asked,), daemon=True).start(); "
        f"sys.exit({code} if asked.wait(100) else 9)"
    )

    warnings = iter([signal.SIGTERM])

    def stop() -> None:
        for number in warnings:  # once: afterwards the signal would end this process
            signal.raise_signal(number)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        launch([sys.executable, "-c", rank], tmp_path, SETTINGS, stop)
    assert stopped.value.saved == saved
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path):
    rank = (
        "import os, pathlib, threading, time; from importlib.machinery import SourceFileLoader; "
        f"SourceFileLoader('tie', {tie.__file__!r}).load_module().tie(threading.Event()); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(100)"
    )
    parent_code = (
        "import sys; from pathlib import Path; from alphaadam_dist.training.start_ranks import launch; "
        "from tests.recipes.test_run_folder import SETTINGS; "
        f"launch([sys.executable, '-c', {rank!r}], Path({str(tmp_path)!r}), SETTINGS, lambda: None)"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code]) as parent:
        pid = _wait_for_text(tmp_path / "pid")
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _alive(int(pid)):
        assert time.monotonic() < deadline, "the rank is still running"
        time.sleep(0.05)


def _wait_for_text(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)
    return path.read_text()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # An orphan nobody reaps stays in the table as a zombie; it no longer runs.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_free_port_is_not_one_that_the_system_gives_away() -> None:
    """A port that the system chose went to another program before the ranks listened on it."""
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) > 1
    assert all(20000 <= port < 29000 for port in ports)


def test_a_port_in_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        port, other = free_port(), free_port()
        taken.bind(("127.0.0.1", port))
        chosen = iter([port - 20000, other - 20000])
        monkeypatch.setattr("secrets.randbelow", lambda below: next(chosen))
        assert free_port() == other
