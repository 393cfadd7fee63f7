"""Start the ranks of a run through its launcher, and stay with them until they end."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from alphaadam_dist.training.job import TIED_TO_PARENT
from alphaadam_dist.training.settings import Settings

LOG_NAME = "train.log"
SIGTERM_CODE = 128 + signal.SIGTERM
_RESTARTS = 1  # a rank may die; a mistake in the settings should not take long to show
_POLL_SECONDS = 0.25
_TAIL_LINES = 30


class Stopped(Exception):
    """SIGTERM came, and the training has ended; ``saved``: with a checkpoint of the step it had come to."""

    def __init__(self, saved: bool) -> None:
        done = "saved" if saved else "the ranks ended before they had saved"
        super().__init__(
            f"Stopped by SIGTERM: {done}. The same command with --resume goes on from the last checkpoint."
        )
        self.saved = saved


class LaunchError(RuntimeError):
    """The ranks ended with an error; the message shows the end of their log."""


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
    return [launcher, *ranks, "--module", "alphaadam_dist.training.job", str(run), optimizer]


def _path() -> str:
    """Where programs are: beside the running interpreter first, for an environment need not be activated to be used."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def launch(line: list[str], folder: Path, settings: Settings, while_running: Callable[[], None]) -> None:
    """Run the command line, calling `while_running` a few times a second; the ranks' output goes to a log.

    SIGTERM to this process is handed to the ranks through their standard input, because the launchers would kill them
    soon after: they save and stop.

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

    log_path = folder / LOG_NAME
    threads = max(1, (os.cpu_count() or 1) // settings.gpus)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        # else restarted ranks find the addresses of the dead ones in the store that torchrun keeps, and call those
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **os.environ,
        "PATH": _path(),  # DeepSpeed compiles with the ninja it finds first
        TIED_TO_PARENT: "1",
    }
    with (
        open(log_path, "a") as log,
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment) as process,
    ):
        before = signal.signal(signal.SIGTERM, stop)
        try:
            while process.poll() is None:
                while_running()
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            # On an interrupt the ranks must be gone before the run's folder is released.
            process.terminate()
            signal.signal(signal.SIGTERM, before)
        while_running()
    if stopping:
        raise Stopped(saved=process.returncode == 0)
    if process.returncode != 0:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        raise LaunchError(f"training in {folder} failed (exit code {process.returncode}):\n\n{tail}\n\n{log_path}")


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
