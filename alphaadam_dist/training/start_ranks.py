"""Start the ranks of a run through its launcher, and stay with them until they end."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from alphaadam_dist.training.reasons import Explained, Reason, heard
from alphaadam_dist.training.settings import Settings
from alphaadam_dist.training.tie import STARTED_BY

LOG_NAME = "train.log"
SIGTERM_CODE = 128 + signal.SIGTERM
_RESTARTS = 1  # for a rank that died; more would only delay the report of a mistake in the settings
_POLL_SECONDS = 0.25
_LAST_WORDS_SECONDS = 5.0
_TAIL_LINES = 30
_DIED = re.compile(r"(?:exitcode\s*:|return code =)\s*-(\d+)")  # what torchrun and DeepSpeed say of a killed rank


class Stopped(Exception):
    """SIGTERM came, and the training has ended. ``saved``: with a checkpoint of the step that it had reached."""

    def __init__(self, saved: bool) -> None:
        done = "saved" if saved else "the ranks ended before they had saved"
        super().__init__(
            f"Stopped by SIGTERM: {done}. The same command with --resume goes on from the last checkpoint."
        )
        self.saved = saved


class LaunchError(Explained):
    """The ranks ended with an error; the message is the reason in one line.

    Attributes:
        tail: the end of what the ranks wrote, where no rank told why it failed.
    """

    def __init__(self, message: str, tail: str = "") -> None:
        super().__init__(message)
        self.tail = tail


class Output:
    """What the ranks write: it goes into the log, and is searched for the reason of a failure.

    It passes through this process, because a full disk, the most common reason, cannot take the log.

    Attributes:
        writer: the descriptor that the ranks write to.
        final: set once a rank failed by itself, not because another rank was gone. A new start would fail too.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._reasons: list[Reason] = []
        self.final = threading.Event()

    def __enter__(self) -> Self:
        self._file = open(self._log, "ab", buffering=0)
        reader, self.writer = os.pipe()
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.writer)
        self._thread.join(_LAST_WORDS_SECONDS)  # a rank that outlived its launcher may hold the pipe open

    def _read(self, reader: int) -> None:
        with open(reader, "rb") as lines, self._file as log:
            for line in lines:
                with contextlib.suppress(OSError):
                    log.write(line)
                text = line.decode(errors="replace").rstrip()
                self._tail.append(text)
                if (reason := heard(text)) is not None:
                    self._reasons.append(reason)
                    if not reason.lost:
                        self.final.set()

    def failure(self, folder: Path) -> LaunchError:
        """The error to raise where the launcher failed."""
        killed = next((found for line in reversed(self._tail) if (found := _DIED.search(line))), None)
        signal_name = signal.Signals(int(killed[1])).name if killed else None
        if (reason := self.reason) is not None:
            more = f" (a rank was ended by {signal_name})" if signal_name and reason.lost else ""
            return LaunchError(f"training in {folder} failed, {self._log} tells how: {reason.text}{more}")
        if signal_name is not None:
            said = f"a rank was ended by {signal_name}, as where memory is short"
        else:
            said = "no rank told why"
        return LaunchError(f"training in {folder} failed: {said}; see the end of {self._log}", "\n".join(self._tail))

    @property
    def reason(self) -> Reason | None:
        """The first that a rank told. A reason of its own goes before one that the end of another rank caused."""
        return next(iter(sorted(self._reasons, key=lambda reason: reason.lost)), None)


def command(run: Path, optimizer: str, settings: Settings) -> list[str]:
    """The launcher's command line: the one place that chooses a launcher."""
    name = "torchrun" if settings.fsdp else "deepspeed"
    launcher = shutil.which(name, path=_path())
    if launcher is None:
        raise ImportError(f"the {name} launcher is not installed")
    if settings.fsdp:
        ranks = ["--standalone", "--nproc-per-node", str(settings.gpus), "--max-restarts", str(_RESTARTS)]
    else:
        ranks = ["--num_gpus", str(settings.gpus), "--master_port", str(free_port()), "--no_local_rank"]
    return [launcher, *ranks, "--module", "alphaadam_dist.training.rank", str(run), optimizer]


def _path() -> str:
    """Where programs are: first beside the running interpreter, whose environment need not be activated."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def launch(line: list[str], folder: Path, settings: Settings, while_running: Callable[[], None]) -> None:
    """Run the command line, calling `while_running` a few times a second; the ranks' output goes to a log.

    SIGTERM to this process is passed to the ranks through their standard input, and they save and stop. The launchers
    would pass it on too, but kill the ranks soon after.

    Raises:
        Stopped: SIGTERM came.
        LaunchError: the ranks failed.
    """
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(process.stdin.fileno(), b"s")

    threads = max(1, (os.cpu_count() or 1) // settings.gpus)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        # without it restarted ranks find the addresses of dead ones in the store that torchrun keeps, and use them
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **os.environ,
        "PATH": _path(),  # DeepSpeed compiles with the ninja it finds first
        STARTED_BY: str(os.getpid()),
    }
    with (
        Output(folder / LOG_NAME) as output,
        subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=output.writer, stderr=output.writer, env=environment
        ) as process,
    ):
        before = signal.signal(signal.SIGTERM, stop)
        try:
            while process.poll() is None:
                while_running()
                if output.final.is_set():
                    output.final.clear()
                    process.terminate()  # torchrun would start the ranks again
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            # On an interrupt the ranks must be gone before the run's folder is released.
            process.terminate()
            signal.signal(signal.SIGTERM, before)
        while_running()
    if stopping and (process.returncode == 0 or output.reason is None):
        raise Stopped(saved=process.returncode == 0)
    if process.returncode != 0:
        raise output.failure(folder)


def free_port() -> int:
    """A port of this machine that nothing listens on. Not one of those that the system gives to connections by itself
    (from 32768 on Linux, 49152 elsewhere): it could give it away before the ranks, seconds later, listen on it."""
    while True:
        port = 20000 + secrets.randbelow(9000)  # below the launchers' own 29500 too
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
