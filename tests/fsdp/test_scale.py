"""Thousands of ranks, simulated: what the exchange of ownership costs, and that it still finds every element once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from benchmarks import ownership_scale

BAR_BYTES = 32 * 10**6


@pytest.fixture(scope="module")
def clean() -> Iterator[ProcessPoolExecutor]:
    """A new process for each simulation: in one that has run other tests, holes in the heap count as memory."""
    context = get_context("forkserver")
    context.set_forkserver_preload([ownership_scale.__name__])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield pool


def simulate(replicas: int, shards: int, scope: str) -> ownership_scale.Result:
    torch.set_num_threads(1)
    ownership_scale.simulate(1, 8, ranks=(5,), scope=scope)  # what is imported on the way is not the exchange's memory
    return ownership_scale.simulate(replicas, shards, ranks=(5, 4095), scope=scope)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "shards", "scope"), [(1, 4096, "global"), (1, 4096, "layer"), (512, 8, "layer"), (2, 2048, "global")],
    ids=["fsdp 4096", "fsdp 4096 layer", "hsdp 512 x 8 layer", "hsdp 2 x 2048"],
)  # fmt: skip
def test_ownership(clean: ProcessPoolExecutor, replicas: int, shards: int, scope: str) -> None:
    result = clean.submit(simulate, replicas, shards, scope).result()
    for at in result.ranks:
        assert at.handshake_bytes < BAR_BYTES
        assert at.peak_bytes < BAR_BYTES
        assert at.seconds < 10  # a third of a second on an idle machine
        assert at.buffer_bytes == (16 if scope == "global" else 16 * ownership_scale.PARAMETERS)
        assert at.elements == result.elements
        assert at.owns == {replicas == 1 or at.rank < shards}


@pytest.mark.slow
def test_ownership_over_stages_and_tensor_parallel_ranks(one_thread: None) -> None:
    """Of 256 ranks the first of a stage owns all it holds, the others not the norms that it has too."""
    result = ownership_scale.simulate_stages(4, 16, 4, 400, ranks=(0, 63, 64, 255), scope="layer")
    for at in result.ranks:
        assert at.elements == result.elements
        assert at.buffer_bytes == 16 * 400
        assert at.owns == ({True} if at.rank % 64 == 0 else {True, False})
