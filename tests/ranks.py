"""A pool of processes, one per rank, that lives for the whole test session.

Importing torch and DeepSpeed and meeting over gloo takes seconds; a test then costs what it computes. A test gives a
module-level function and gets what each rank returned.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 600.0  # DeepSpeed may compile an operation first
MANY_THREADS = 64  # a process group has three
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent ends


class RankError(Exception):
    """A function raised on some rank. The message has every failed rank's traceback."""


def _serve(rank: int, world: int, store: str, port: int, connection: Connection) -> None:
    if sys.platform == "linux":  # it may be stopped when the tests are killed, and would stay so
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    import deepspeed.utils.logging

    deepspeed.utils.logging.logger.setLevel("ERROR")
    gc.freeze()  # DeepSpeed collects garbage for every ZeRO-3 engine, much of a second among all that was imported
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:  # the session ended
            return
        try:
            connection.send((True, function(*args, **kwargs)))
            continue
        except BaseException:
            error = traceback.format_exc()
        gc.collect()  # its frames hold files, which would stay open while this process is stopped
        connection.send((False, error))


class Ranks:
    """``world`` processes that are one process group. They are stopped but in ``run``.

    Each process group that a test leaves behind wakes up a hundred times a second in Gloo, in every rank: together
    they took a whole core from the tests.
    """

    alive: ClassVar[weakref.WeakSet[Ranks]] = weakref.WeakSet()

    def __init__(self, world: int) -> None:
        self.world = world
        self.alive.add(self)
        self._port = 29600 + os.getpid() % 2000
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = tempfile.mktemp(prefix="ranks")
        self._connections, self._processes = [], []
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            args = (rank, self.world, store, self._port, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._connections.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What ``function(*args, **kwargs)`` returned on each rank. Raises RankError if it raised on any."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            os.kill(process.pid, signal.SIGCONT)
            connection.send((function, args, kwargs))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(TIMEOUT if not any(not ok for ok, _ in answers) else 20.0):
                failed = [text for ok, text in answers if not ok]
                self.restart()
                raise RankError("\n".join([*failed, f"rank {rank} did not answer"]))
            answers.append(connection.recv())
        for process in self._processes:
            os.kill(process.pid, signal.SIGSTOP)
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            if len(failed) < self.world:
                self.restart()  # the group may be out of step
            raise RankError("\n".join(failed))
        return [value for _, value in answers]

    def restart_if_crowded(self) -> None:
        """To be called between tests."""
        if any(len(list(Path(f"/proc/{process.pid}/task").glob("*"))) > MANY_THREADS for process in self._processes):
            self.restart()

    def restart(self) -> None:
        """Fresh processes, after an error or for a test that must start from nothing."""
        self.stop()
        self._start()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self._port}_*"):
            buffer.unlink()  # DeepSpeed leaves it there, 66 MiB a rank
