"""Ranks end with the program that started them.

A rank whose launcher was killed must not train on unseen. Each rank watches the processes between itself and the
program that the user started.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

STARTED_BY = "ALPHAADAM_STARTED_BY"
"""In the environment: the number of the process that the user started, where it is not a launcher of the list below."""

SECONDS_TO_SAVE = 30.0
"""What torchrun and DeepSpeed give their ranks between SIGTERM and SIGKILL."""

_POLL_SECONDS = 0.5
_LAUNCHERS = {
    "accelerate", "deepspeed", "hydra_pmi_proxy", "mpiexec", "mpirun", "orted", "orterun", "prted", "prterun",
    "slurmstepd", "srun", "torchrun",
}  # fmt: skip
_MODULES = {
    "accelerate.commands.launch", "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.launch",
    "torch.distributed.run",
}  # fmt: skip


def tie(asked_to_stop: threading.Event) -> None:
    """Watch, from a thread, the processes that started this one. When one of them is gone, this one ends.

    Ranks of `alphaadam train` end at once: it held the lock of their folder. Others hold it themselves, and a SIGTERM
    may have reached only their launcher, so they are asked to stop, and end when they have saved, or after as long as
    launchers give them. A process that no launcher started is not tied: it may outlive its shell.
    """
    above = list(_ancestors())
    starter = os.environ.get(STARTED_BY)
    if starter is None:
        watched, seconds = above[: _launchers_end(above)], SECONDS_TO_SAVE
    elif int(starter) in above:
        watched, seconds = above[: above.index(int(starter)) + 1], 0.0
    else:
        end(1)
    if watched:
        threading.Thread(target=_watch, args=(watched, asked_to_stop, seconds), daemon=True).start()


def _watch(pids: list[int], asked_to_stop: threading.Event, seconds: float) -> None:
    chain = list(zip([os.getpid(), *pids], pids, strict=False))
    while all(_parent(child) == parent for child, parent in chain):  # orphans get another parent at once
        time.sleep(_POLL_SECONDS)
    asked_to_stop.set()
    time.sleep(seconds)
    end(1)


def end(code: int) -> NoReturn:
    """End this process at once, whatever its threads do, and take along what DeepSpeed would leave in /dev/shm."""
    if "deepspeed" in sys.modules:
        from alphaadam_dist.training.leftovers import free_shared_memory

        free_shared_memory()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _ancestors() -> Iterator[int]:
    pid = _parent(os.getpid())
    while pid is not None and pid > 0:
        yield pid
        pid = _parent(pid)


def _launchers_end(above: list[int]) -> int:
    """How many of these processes there are up to the launcher, and the launcher that started that."""
    are = [_is_launcher(pid) for pid in above]
    if True not in are:
        return 0
    first = are.index(True)
    return next((i for i in range(first, len(are)) if not are[i]), len(are))


def _is_launcher(pid: int) -> bool:
    words = _read(pid, "cmdline").split("\0")
    names = {Path(word).name.partition(":")[0] for word in words[:3]}
    return bool(names & _LAUNCHERS or _MODULES.intersection(words[1:4]))


def _parent(pid: int) -> int | None:
    """The parent of a process; None where it has ended."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields and fields[0] not in "ZX" else None


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
