"""Three ranks take steps until one of them is lost; what the others then say. Run as `losing_ranks.py`, once.

All cases run at the same time, in processes forked from one that has imported everything. Prints a JSON object: case ->
rank -> the error, for every rank that could still say something.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._dynamo  # a step needs it, and so that not each of 39 processes imports it
import torch.distributed as dist
import torch.distributed.tensor
from torch import nn

from alphaadam_dist import AlphaAdam, rank_failures
from alphaadam_dist.training.start_ranks import free_port

WORLD = 3
LOST_AT = 3
# case: (the lost rank, whether it dies or hangs, the optimizer's options)
CASES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "killed": (1, True, {"sharding": "sharded"}),
    "killed-delayed": (1, True, {"sharding": "sharded", "sync": "delayed"}),
    "killed-replica": (1, True, {"verify_every": 1}),
    "killed-host-of-the-store": (0, True, {"sharding": "sharded"}),
    "hung": (1, False, {"sharding": "sharded"}),
}
# the question of the handshake in which rank 1 dies, and the optimizer's options
HANDSHAKE: dict[str, dict[str, Any]] = {
    "exchange of who holds which shard": {},
    "does every element count once?": {},
    "which kernels can all ranks have?": {},
    "is this the start of a run?": {},
    "are there shards without a whole?": {},
    "do replicas hold the same values?": {},
    "do replicas get the same gradients?": {},
    "are shards copies?": {"sharding": "sharded"},
}


def rank(case: str, here: int, port: int, say: Connection) -> None:
    torch.set_num_threads(1)
    rank_failures.PATIENCE = 25.0  # more than the timeout: so each rank has met the failure before another names it
    address = f"tcp://127.0.0.1:{port}"
    # to meet takes as long as a busy machine needs; a rank that is lost after that is waited for in vain
    dist.init_process_group("gloo", init_method=address, rank=here, world_size=WORLD, timeout=timedelta(seconds=90))
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=20), dist.group.WORLD)
    try:
        (in_the_handshake if case in HANDSHAKE else in_a_step)(case, here)
    except RuntimeError as error:
        say.send(f"{type(error).__name__}: {error}")
        time.sleep(60)  # so that no rank hears of this one's end before it hears of the lost one's
    os._exit(0)


def in_a_step(case: str, here: int) -> None:
    who, dies, options = CASES[case]
    param = nn.Parameter(torch.ones(5))
    optimizer = AlphaAdam([param], **options)
    for step in range(10):
        if step == LOST_AT and here == who:
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
        param.grad = torch.ones(5)
        optimizer.step()


def in_the_handshake(case: str, here: int) -> None:
    if here == 1:
        rank_failures.explaining = dying_in(case)  # type: ignore[assignment]
    param = nn.Parameter(torch.arange(5.0))
    param.grad = torch.ones(5)
    AlphaAdam([("weight", param)], process_group=dist.group.WORLD, **HANDSHAKE[case]).step()


def dying_in(case: str) -> Callable[..., Any]:
    @contextlib.contextmanager
    def explaining(what: str, group: Any) -> Iterator[None]:
        if case in what:
            os.kill(os.getpid(), signal.SIGKILL)
        yield

    return explaining


def main() -> None:
    context = multiprocessing.get_context("fork")
    heard: dict[str, dict[int, Any]] = {}
    started = []
    for case in (*CASES, *HANDSHAKE):
        port, heard[case] = free_port(), {}
        for here in range(WORLD):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=rank, args=(case, here, port, theirs))
            process.start()
            theirs.close()
            started.append(process)
            heard[case][here] = mine
    deadline = time.monotonic() + 180
    said: dict[str, dict[int, str]] = {case: {} for case in heard}
    for case in heard:
        for here, connection in heard[case].items():
            if here != CASES.get(case, (1,))[0] and connection.poll(max(0.0, deadline - time.monotonic())):
                said[case][here] = connection.recv()
    for process in started:
        process.kill()
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
