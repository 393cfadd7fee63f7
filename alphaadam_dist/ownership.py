"""Which rank counts which shard, so that every element of the model counts exactly once.

The owner of a shard is the lowest rank of the reduce group that holds its (key, part). Other simple rules are wrong:
"coordinate 0 on every replicated mesh dimension" counts twice when a parameter lives on a submesh, and weighting by
1/replicas makes the sums inexact. Ranks exchange one table of (key hash, part hash, numel), 24 bytes a shard, once per
layout, a few MiB at a time; each proves that the owned elements of its parameters add up to the whole of them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import Shard

SLICE_BYTES = 2 * 2**20  # of the exchange, in memory at a time


@dataclass(frozen=True, eq=False)
class Slot:
    """One run of an optimizer parameter, as the kernels see it: a shard, or the padding between shards.

    ``row`` is the scope it belongs to in the statistics buffer. ``owned`` is whether this rank counts it. ``late`` is
    how many updates it is behind its optimizer parameter.
    """

    start: int
    numel: int
    row: int
    owned: bool
    whole: bool  # it is the optimizer parameter's whole local tensor, which then needs no cutting
    late: int = 0


@dataclass
class Layout:
    """Where every element counts.

    Attributes:
        params: the optimizer parameters this was built for, in order.
        slots: for each of them its slots, ascending.
        keys: the model parameters that this rank knows, by row (layer scope; empty for global).
        rows: rows of the statistics buffer: 1 for global scope, one per model parameter for layer scope.
        numel: elements of the whole model.
        group: the process group to all-reduce over; None where every rank holds everything and nothing is reduced.
        device: where the statistics live.
    """

    params: tuple[Tensor, ...]
    slots: dict[Tensor, tuple[Slot, ...]]
    keys: dict[int, str]
    rows: int
    numel: int
    group: dist.ProcessGroup | None
    device: torch.device
    _gathered: dict[tuple[Slot, ...], tuple[Tensor, Tensor, int]] = field(default_factory=dict, repr=False)

    def gather(self, slots: tuple[Slot, ...]) -> tuple[Tensor, Tensor, int]:
        """Rows (int64) and ownership (float64, 0 or 1) of these slots on the device, and the elements they own."""
        if slots not in self._gathered:
            if len(self._gathered) >= 256:  # a model whose unused parameters change from step to step
                self._gathered.clear()
            rows = torch.tensor([s.row for s in slots], dtype=torch.int64, device=self.device)
            owned = torch.tensor([s.owned for s in slots], dtype=torch.float64, device=self.device)
            self._gathered[slots] = rows, owned, sum(s.numel for s in slots if s.owned)
        return self._gathered[slots]


def _hash(value: Hashable) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def _exchange(table: Tensor, group: dist.ProcessGroup, device: torch.device) -> Iterator[Tensor]:
    """All ranks' rows of an int64 table (n, 3), a slice of the keys at a time: (world, height, 3) on the CPU.

    A slice has every row of its keys, so each can be judged by itself, and thousands of ranks need little memory.
    Where a rank has fewer rows than ``height`` the rest have numel -1.
    """
    world = dist.get_world_size(group)
    longest = torch.tensor(len(table), device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    count = max(1, math.ceil(world * int(longest) * table.shape[1] * table.itemsize / SLICE_BYTES))
    slice_of = table[:, 0].remainder(count)
    heights = torch.bincount(slice_of, minlength=count).to(device)
    dist.all_reduce(heights, op=dist.ReduceOp.MAX, group=group)
    for i, height in enumerate(heights.tolist()):
        if height == 0:
            continue
        mine = table[slice_of == i]
        padded = torch.nn.functional.pad(mine, (0, 0, 0, height - len(mine)), value=-1).to(device)
        gathered = torch.empty((world * height, table.shape[1]), dtype=torch.int64, device=device)
        dist.all_gather_single(gathered, padded, group=group)
        yield gathered.view(world, height, -1).cpu()


def _first_holders(gathered: Tensor) -> Tensor:
    """The lowest rank that holds each distinct part in a slice of the exchange: int64 rows (key, part, numel, rank)."""
    flat = gathered.view(-1, gathered.shape[2])
    present = (flat[:, 2] >= 0).nonzero().squeeze(1)
    order = present[torch.argsort(flat[present, 1], stable=True)]  # by part, then rank
    part = flat[order, 1]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = part[1:] != part[:-1]
    holders = order[first]
    return torch.cat((flat[holders], (holders // gathered.shape[1])[:, None]), dim=1)


def _prove_coverage(shards: Sequence[Shard], held: Mapping[int, int], world: int) -> str | None:
    """What is wrong with this rank's parameters, or None. ``held`` is how many elements of each key are owned."""
    keys = Counter(shard.key for shard in shards)
    twice = next((key for key, count in keys.items() if count > 1), None)
    if twice is not None:
        return f"two parameters are named {twice!r}: every parameter needs a name of its own"
    for shard in shards:
        if shard.global_numel is not None and held[_hash(shard.key)] != shard.global_numel:
            return (
                f"parameter {shard.key!r} has {shard.global_numel} elements, but the shards on the {world} ranks of "
                f"the reduce group hold {held[_hash(shard.key)]} different ones (here: part {shard.part}, "
                f"{shard.numel} elements). Give the optimizer the process_group over which this model is sharded, or "
                "sharding='replicated' / 'sharded' where plain tensors were misjudged"
            )
    return None


def _stop_together(problem: str | None, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Raise ValueError on all ranks where one has a problem: none may wait for one that has stopped."""
    if group is not None:
        here, nowhere = dist.get_rank(group), dist.get_world_size(group)
        first = torch.tensor(nowhere if problem is None else here, device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
        if int(first) < nowhere:
            told = [problem]
            dist.broadcast_object_list(told, group_src=int(first), group=group, device=device)
            problem = problem or f"rank {int(first)} of the reduce group found: {told[0]}"
    if problem is not None:
        raise ValueError(problem)


def build_layout(
    params: Sequence[Tensor],
    shards: Sequence[Sequence[Shard]],
    extents: Sequence[int],
    *,
    scope: str,
    group: dist.ProcessGroup | None,
    device: torch.device,
    merge: bool = False,
    names: Iterable[str] = (),
) -> Layout:
    """Decide who counts what. Collective over ``group`` where one is given; else everything is this rank's own.

    Args:
        params: optimizer parameters.
        shards: for each its shards, ascending in ``start``.
        extents: for each the number of its local elements, padding included.
        device: of the statistics buffer and of the exchange.
        merge: under global scope count each parameter as one run where this rank owns all its shards. Right where
            padding never carries a gradient.
        names: keys that this rank can name beside those of its own shards.

    Raises:
        ValueError: two parameters have one key, or some element of the model would not count exactly once.
    """
    flat = [shard for held in shards for shard in held]
    hashed = [(_hash(s.key), _hash((s.key, s.part)), s.numel) for s in flat]
    held_numels: Counter[int] = Counter()
    owned_parts: set[int] = set()
    if group is None:
        for key, part, count in hashed:
            held_numels[key] += count
            owned_parts.add(part)
    else:
        rank = dist.get_rank(group)
        for gathered in _exchange(torch.tensor(hashed, dtype=torch.int64).reshape(-1, 3), group, device):
            first = _first_holders(gathered)
            owned_parts.update(first[first[:, 3] == rank, 1].tolist())
            keys_here, of_row = first[:, 0].unique(return_inverse=True)
            numels = torch.zeros_like(keys_here).index_add_(0, of_row, first[:, 2])
            held_numels.update(dict(zip(keys_here.tolist(), numels.tolist(), strict=True)))
    _stop_together(
        _prove_coverage(flat, held_numels, 1 if group is None else dist.get_world_size(group)), group, device
    )

    row_of = {key: row for row, key in enumerate(sorted(held_numels))} if scope == "layer" else {}
    slots: dict[Tensor, tuple[Slot, ...]] = {}
    owns = iter([part in owned_parts for _, part, _ in hashed])
    for param, held, extent in zip(params, shards, extents, strict=True):
        runs = [(s.start, s.numel, row_of.get(_hash(s.key), 0), next(owns)) for s in held]
        if merge and scope == "global" and all(own for *_, own in runs):
            runs = [(0, extent, 0, True)]
        slots[param] = tuple(
            Slot(start, count, row, own, whole=count == extent)
            for start, count, row, own in _with_padding(runs, extent)
        )
    keys = {row_of[_hash(key)]: key for key in {*names, *(s.key for s in flat)} if _hash(key) in row_of}
    return Layout(tuple(params), slots, keys, max(len(row_of), 1), held_numels.total(), group, device)


def _with_padding(runs: Sequence[tuple[int, int, int, bool]], numel: int) -> list[tuple[int, int, int, bool]]:
    """Fill the gaps between runs with padding: it is updated as AdamW would, and owned by nobody."""
    full, position = [], 0
    for start, count, row, own in runs:
        if start > position:
            full.append((position, start - position, row, False))
        full.append((start, count, row, own))
        position = start + count
    if position < numel:
        full.append((position, numel - position, runs[-1][2] if runs else 0, False))
    return full


def statistics_device(params: Sequence[Tensor], group: dist.ProcessGroup | None) -> torch.device:
    """Where the parameters are, unless the group cannot reduce there (NCCL with parameters offloaded to the CPU)."""
    device = params[0].device if params else torch.device("cpu")
    if group is not None and device.type not in dist.get_backend_config(group):
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return device
