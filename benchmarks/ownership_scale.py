"""What the handshake costs at thousands of ranks: bytes, memory and time, of one rank of a simulated world.

    PYTHONPATH=. python benchmarks/ownership_scale.py

The process group is torch's fake one; what other ranks would have sent is computed from the same mesh and placements.
Everything but the wire and the reading of the parameters, which lie on meta, is real: the time is that of the
computation alone, on this process's clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from alphaadam_dist import layout as layouts
from alphaadam_dist import replicas
from alphaadam_dist.kernels import consensus
from alphaadam_dist.layout import _hash, build_layout
from alphaadam_dist.options import FamilyOptions
from alphaadam_dist.shards import dtensor
from alphaadam_dist.statistics import Statistics

MACHINE = "2 cores, x86-64 cloud VM, no GPU"
RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def shapes() -> dict[str, tuple[int, ...]]:
    """300 parameters of a Llama of 7B: 33 layers of nine, embedding, last norm and head."""
    layer: dict[str, tuple[int, ...]] = {
        **{f"attention.{name}": (4096, 4096) for name in "qkvo"},
        **{f"feed_forward.{name}": (11008, 4096) for name in ("gate", "up")},
        "feed_forward.down": (4096, 11008),
        "attention_norm": (4096,),
        "feed_forward_norm": (4096,),
    }
    model = {f"layers.{i}.{name}.weight": shape for i in range(33) for name, shape in layer.items()}
    return {"embedding.weight": (32000, 4096), **model, "norm.weight": (4096,), "head.weight": (32000, 4096)}


PARAMETERS = len(shapes())


@dataclass
class AtRank:
    """One rank: what it received to agree, its peak memory beyond that at rest, its buffer of statistics."""

    rank: int
    handshake_bytes: int
    peak_bytes: int
    buffer_bytes: int
    seconds: float
    elements: int
    owns: set[bool]


@dataclass
class Result:
    elements: int
    ranks: list[AtRank]


@dataclass
class World:
    """What all ranks would put into the exchange: (world, parameters of a rank, 3), the ranks of a stage together."""

    table: Tensor
    stages: int = 1

    def heights(self, count: int) -> Tensor:
        """Rows of each of ``count`` slices, on the rank that has most."""
        first = self.table[:: len(self.table) // self.stages, :, 0]
        return torch.stack([keys.remainder(count).bincount(minlength=count) for keys in first]).amax(0)

    def slice_of(self, i: int, count: int, out: Tensor) -> None:
        """Write slice ``i`` of all ranks into ``out``, (world, height, 3)."""
        out.fill_(-1)
        for part, into in zip(self.table.chunk(self.stages), out.chunk(self.stages), strict=True):
            rows = (part[0, :, 0].remainder(count) == i).nonzero().squeeze(1)
            into[:, : len(rows)] = part[:, rows]


def simulate(copies: int, shards: int, ranks: Sequence[int], scope: str = "global") -> Result:
    """HSDP of ``copies`` x ``shards`` ranks (one copy: FSDP), seen from some of them."""
    placements: tuple[Placement, ...] = (Split(0),) if copies == 1 else (Replicate(), Split(0))
    sizes = (shards,) if copies == 1 else (copies, shards)
    world = World(_tables_of_all(sizes, placements))
    elements = sum(torch.Size(shape).numel() for shape in shapes().values())

    def params() -> dict[str, DTensor]:
        mesh = init_device_mesh("cpu", sizes)
        return {name: _parameter(shape, mesh, placements) for name, shape in shapes().items()}

    return Result(elements, [_at(rank, params, world, scope) for rank in ranks])


def simulate_stages(
    stages: int, shards: int, tensor: int, parameters: int, ranks: Sequence[int], scope: str = "global"
) -> Result:
    """Pipeline stages of FSDP x tensor parallelism, ``parameters`` in all, seen from some ranks.

    Of a matrix a rank has a block, of a norm what FSDP gives it, as the tensor-parallel ranks beside it have.
    """
    sizes, of_stage = (shards, tensor), parameters // stages
    kinds = list(shapes().values())[1:10]
    named = [{f"stage{stage}.{i}.weight": kinds[i % len(kinds)] for i in range(of_stage)} for stage in range(stages)]
    table = torch.empty((stages, shards, tensor, of_stage, 3), dtype=torch.int64)
    for stage, held in enumerate(named):
        for i, (name, shape) in enumerate(held.items()):
            places = [
                [_hash((name, dtensor.place(_placements(shape), (s, t)))) for t in range(tensor)] for s in range(shards)
            ]
            table[stage, :, :, i, 0], table[stage, :, :, i, 1] = _hash(name), torch.tensor(places)
            table[stage, :, :, i, 2] = torch.Size(shape).numel() // (shards * (tensor if len(shape) > 1 else 1))
    world = World(table.view(stages * shards * tensor, of_stage, 3), stages)
    elements = sum(torch.Size(shape).numel() for held in named for shape in held.values())

    def params() -> dict[str, DTensor]:
        stage, first = divmod(dist.get_rank(), shards * tensor)
        of_mine = torch.arange(shards * tensor).view(sizes) + dist.get_rank() - first
        mesh = DeviceMesh("cpu", of_mine)
        return {name: _parameter(shape, mesh, _placements(shape)) for name, shape in named[stage].items()}

    return Result(elements, [_at(rank, params, world, scope) for rank in ranks])


def _placements(shape: tuple[int, ...]) -> tuple[Placement, ...]:
    return Split(0), Split(1) if len(shape) > 1 else Replicate()


@functools.cache
def _tables_of_all(sizes: tuple[int, ...], placements: tuple[Placement, ...]) -> Tensor:
    """(world, parameters, 3): what every rank would put into the exchange."""
    by_shard = torch.empty((sizes[-1], PARAMETERS, 3), dtype=torch.int64)
    for i, (name, shape) in enumerate(shapes().items()):
        rows = [len(chunk) for chunk in torch.arange(shape[0]).chunk(sizes[-1])]
        rows += [0] * (sizes[-1] - len(rows))
        parts = [dtensor.place(placements, [0] * (len(sizes) - 1) + [index]) for index in range(sizes[-1])]
        by_shard[:, i, 0] = _hash(name)
        by_shard[:, i, 1] = torch.tensor([_hash((name, part)) for part in parts])
        by_shard[:, i, 2] = torch.tensor(rows) * torch.Size(shape[1:]).numel()
    return by_shard.repeat(torch.Size(sizes[:-1]).numel(), 1, 1)


def _at(rank: int, params_of: Callable[[], dict[str, DTensor]], world: World, scope: str) -> AtRank:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=len(world.table))
    try:
        params = params_of()
        held = [dtensor.shards(param, name) for name, param in params.items()]
        group = dist.group.WORLD
        assert group is not None
        received, count = 0, 0
        reduce = dist.all_reduce
        slices: Iterator[int] = iter(())

        def reduced(tensor: Tensor, **options: Any) -> Any:
            nonlocal received, count, slices
            received += tensor.nbytes
            if count == 0 and tensor.ndim == 1:  # the heights of the slices
                count = len(tensor)
                tensor.copy_(world.heights(count))
                slices = iter(tensor.nonzero().squeeze(1).tolist())
            return reduce(tensor, **options)

        def gather(output: Tensor, given: Tensor, group: object) -> None:
            nonlocal received
            received += output.nbytes
            world.slice_of(next(slices), count, output.view(len(world.table), -1, 3))

        options = FamilyOptions(scope=scope)
        statistics = Statistics(options)
        optimizer: Any = SimpleNamespace(_run=SimpleNamespace(layout=None), state={}, _adopt=lambda: statistics)
        patches = contextlib.ExitStack()
        patches.enter_context(mock.patch.object(layouts, "all_gather_single", gather))
        patches.enter_context(mock.patch.object(dist, "all_reduce", reduced))
        with patches, _peak_memory() as peak:
            start = time.process_time()
            layout = build_layout(
                list(params.values()), held, [s.numel for (s,) in held], scope=scope, group=group, device=CPU
            )
            consensus.settle(layout, options)
            replicas.prove(layout, optimizer)
            seconds = time.process_time() - start
        statistics.open(layout)
        owned = {segment.owned for segments in layout.segments.values() for segment in segments}
        return AtRank(rank, received, peak[0], statistics._buffer.nbytes, seconds, layout.numel, owned)
    finally:
        dist.destroy_process_group()


def _parameter(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    local, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    part = torch.empty(local, device="meta")
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=part.stride() or (1,)
    )


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Bytes by which this process grew at its largest inside the context (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # else what the heap kept of earlier work would hide it
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, peak = _status("VmRSS"), [0]
    yield peak
    peak[0] = _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    simulate(1, 8, (0,))  # loads what the first use of an operation loads
    for name, copies, shards in (
        ("FSDP 8", 1, 8), ("FSDP 4096", 1, 4096), ("HSDP 512 x 8", 512, 8), ("HSDP 2 x 2048", 2, 2048)
    ):  # fmt: skip
        for scope in ("global", "layer"):
            ranks = (0, copies * shards - 1)
            rows += [_row(name, PARAMETERS, scope, at) for at in simulate(copies, shards, ranks, scope).ranks]
    for scope in ("global", "layer"):
        result = simulate_stages(8, 64, 8, 10_000, (0, 4095), scope)
        rows += [_row("PP 8 x TP 8 x FSDP 64", 10_000, scope, at) for at in result.ranks]
    today = datetime.date.today().isoformat()
    text = [
        "# Agreeing on ownership at scale",
        "",
        f"{today}, {MACHINE}, torch {torch.__version__}; `benchmarks/ownership_scale.py`, one thread. "
        "Parameters of the shapes of a Llama of 7B, one rank of a simulated world: neither the wire nor the one read "
        "of what several ranks hold is in the time, which is the process's own. Once per layout, not per step.",
        "",
        "| world | parameters | scope | rank | handshake received, MB | peak memory, MB | CPU, s | buffer, bytes "
        "| owns |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    (RESULTS / f"{today}-ownership-scale.md").write_text("\n".join(text))


def _row(name: str, parameters: int, scope: str, at: AtRank) -> str:
    owns = "some" if len(at.owns) > 1 else "all" if True in at.owns else "nothing"
    row = (
        f"| {name} | {parameters} | {scope} | {at.rank} | {at.handshake_bytes / 1e6:.1f} | {at.peak_bytes / 1e6:.1f} | "
        f"{at.seconds:.2f} | {at.buffer_bytes} | {owns} |"
    )
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
