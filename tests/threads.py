"""Ranks on threads of this process: a process group of any size in milliseconds, for tests of what torch shards.

torch's threaded process group copies between tensors, so a collective costs next to nothing. Seeds are of the process
and race: what runs here uses Generators and copies of state dicts.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup

from .ranks import RankError

SECONDS = 120.0


def run(world: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """What ``function(*args, **kwargs)`` returned on each of ``world`` ranks. Raises RankError if it raised on any."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    store = dist.HashStore()
    results: list[Any] = [None] * world
    errors: dict[int, str] = {}

    def serve(rank: int) -> None:
        dist.init_process_group(backend="threaded", rank=rank, world_size=world, store=store)
        try:
            results[rank] = function(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, SystemExit):  # how the group ends ranks that wait for one that failed
                errors[rank] = traceback.format_exc()
            _end_waiting(error)
        finally:
            dist.destroy_process_group()

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(world)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        for rank, thread in enumerate(threads):
            if thread.is_alive():
                frame = sys._current_frames()[thread.ident or 0]
                errors.setdefault(rank, "did not end:\n" + "".join(traceback.format_stack(frame)[-8:]))
    finally:
        ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        torch.set_num_threads(cores)
    if errors:
        raise RankError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(errors.items())))
    return results


def _end_waiting(error: BaseException) -> None:
    """End the ranks that wait for this one."""
    while True:
        try:
            return ProcessLocalGroup.exception_handle(error)
        except RuntimeError:  # another rank began a collective while torch went through its dictionary of them
            continue


class Collectives:
    """Records the (name, bytes) of every collective that this thread's rank takes part in, by whatever way."""

    _recorders = threading.local()
    _lock = threading.Lock()
    _original: Any = None

    def __enter__(self) -> Collectives:
        self.seen: list[str] = []
        with Collectives._lock:
            if Collectives._original is None:
                Collectives._original = ProcessLocalGroup._start_coll
                ProcessLocalGroup._start_coll = staticmethod(Collectives._recorded)
        Collectives._recorders.active = self
        return self

    @staticmethod
    def _recorded(collective: Any, group: Any) -> Any:
        active = getattr(Collectives._recorders, "active", None)
        if active is not None:
            active.seen.append(type(collective).__name__)
        return Collectives._original(collective, group)

    def __exit__(self, *_: Any) -> None:
        Collectives._recorders.active = None
