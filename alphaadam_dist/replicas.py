"""Are replicas replicas? Ranks that claim the same shard of a parameter must hold the same bits, and get one gradient.

Names and meshes say who holds copies of what, and they may say it wrongly: pipeline stages or experts whose modules
have equal local names, islands that are models of their own, ranks that began from other seeds, FSDP1's replicas under
HYBRID_SHARD that count as parts. So the ranks compare fingerprints of the shards that several ranks hold: one number
for all shards that the same ranks hold, 16 bytes in an all-reduce. Only where those differ is each shard compared.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import fingerprint, rank_failures
from .fingerprint import UNKNOWN
from .handshake import first_to_say
from .layout import HeldShard, Layout
from .local_tensors import gradient
from .persistence import Persistent
from .tensors import local

IDS = 2**17  # compared at a time: 2 MiB
DESCRIBED = 2**10  # of the shards that differ, how many are measured
UNRELATED = 0.5
"""Relative deviation of two gradients beyond which they are not those of one parameter. Low precision and a backward
that is not deterministic stay far below; gradients of different parameters are at 1.4, or at 1 where one is zero."""
OTHERS = (
    "If these are different parameters (pipeline stages, experts or models with equal local names), give each a name "
    "that is unique in the whole model, as in AlphaAdam([(f'stage{i}.{name}', p) for name, p in "
    "stage.named_parameters()], process_group=...), and models of their own a process_group each"
)


@dataclass(frozen=True)
class Difference:
    """The shard that differs most between ranks that claim it, how many others do, and which ranks agree on it.

    ``deviation`` is the largest from what the first of the ranks holds, as an L2 norm relative to the larger of both,
    to 10 %; inf where there are NaN.
    """

    key: str
    others: int
    holders: tuple[tuple[int, ...], ...]
    deviation: float

    def __str__(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        sides = ", another on ".join(rank_failures.people(ranks) for ranks in self.holders[:3])
        return f"parameter {self.key!r}{more} (one on {sides}; relative deviation {self.deviation:.1e})"


# ---- what follows from it


def prove(layout: Layout, optimizer: Persistent) -> None:
    """Compare what ranks claim to hold alike in a layout that was just built. Collective over its group, if it has one.

    Raises:
        ValueError: at a fresh start, on all ranks, where copies differ or different shards are copies. Later that is a
            warning, once: replicas may drift apart, and a run that goes on must not die of it. Equal copies that get
            unrelated gradients are a warning from the first step on.
    """
    before, group = optimizer._run.layout, layout.group
    layout.drift_told = before is not None and before.drift_told
    if group is None or layout.drift_told:
        return
    fresh = is_fresh(optimizer, group, layout.device, first=before is None)
    without_whole = any(shard.global_numel is None for shard in layout.shards)
    by_rank = first_to_say(without_whole or None, group, layout.device, "are there shards without a whole?") is not None
    grads = {shard.param: gradient(shard.param) for shard in layout.shards} if fresh else {}
    problem = _differing(layout, group) if layout.replicas else None
    if problem is None and by_rank:
        problem = _copies_taken_for_shards(layout, group, grads)
    if problem is not None:
        report(layout, problem, fresh=fresh)
    elif grads and layout.replicas:
        unrelated = _with_unrelated_gradients(layout, group, grads)
        if unrelated is not None:
            _warn(unrelated)  # local SGD is meant to do so


def is_fresh(optimizer: Persistent, group: dist.ProcessGroup, device: torch.device, *, first: bool) -> bool:
    """On no rank has the optimizer loaded anything or taken a step, and all say ``first``. Collective; synchronises."""
    loaded = any(state for state in optimizer.state.values() if isinstance(state, dict))
    begun = not first or loaded or optimizer._adopt().state()[0] != 0
    return first_to_say(begun or None, group, device, "is this the start of a run?") is None


def report(layout: Layout, problem: str, *, fresh: bool) -> None:
    """Raise the problem as a ValueError at a fresh start, else warn, once in the optimizer's life."""
    if fresh:
        raise ValueError(problem)
    if not layout.drift_told:
        layout.drift_told = True
        _warn(problem)


def _warn(problem: str) -> None:
    warnings.warn(f"{problem}. The run goes on; this is said once", stacklevel=3)


def not_copies(difference: Difference) -> str:
    """What to say of ranks that hold different values of what is counted as one."""
    return (
        f"ranks that should hold copies of one part hold different values of {difference}. {OTHERS}. If they are "
        "copies, they were never made equal (other seeds?) or have drifted apart: broadcast them from one rank before "
        "the first step"
    )


# ---- the comparisons


def _differing(layout: Layout, group: dist.ProcessGroup) -> str | None:
    """What is wrong with the values of shards that several ranks hold. Collective, and the same on all ranks."""
    difference = where_apart(layout, group, layout.device, "handshake (do replicas hold the same values?)")
    return None if difference is None else not_copies(difference)


def _with_unrelated_gradients(
    layout: Layout, group: dist.ProcessGroup, grads: Mapping[Tensor, Tensor | None]
) -> str | None:
    """What is wrong with the gradients of shards that several ranks hold. Collective, and the same on all ranks."""
    shards = _copies(layout, group)
    given = [_elements(shard, grads[shard.param]) for shard in shards]
    what = "handshake (do replicas get the same gradients?)"
    difference = _compare(layout, shards, given, group, layout.device, what)
    if difference is None or not UNRELATED < difference.deviation < math.inf:
        return None
    return (
        f"ranks that hold equal values of one part have unrelated gradients of {difference}. {OTHERS}. If they are "
        "copies, average their gradients before step(), as DistributedDataParallel does"
    )


def _copies_taken_for_shards(
    layout: Layout, group: dist.ProcessGroup, grads: Mapping[Tensor, Tensor | None]
) -> str | None:
    """What is wrong with the shards that are told apart by their ranks alone. Collective, the same on all ranks.

    Two ranks whose shards are all equal, bit for bit, hold copies. Shards of one value, as norms and biases are at
    first, prove nothing.
    """
    telling = [shard for shard in layout.shards if shard.global_numel is None and fingerprint.varies(_values(shard))]
    values = fingerprint.fingerprints([_values(shard) for shard in telling])
    given = fingerprint.fingerprints([_elements(shard, grads.get(shard.param)) for shard in telling])
    numbers = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device="cpu")
    if telling:
        names = [shard.key for shard in telling]
        numbers[dist.get_rank(group)] = fingerprint.joined(list(zip(names, values, given, strict=True)))
    numbers = _reduced(numbers, dist.ReduceOp.SUM, group, layout.device, "handshake (are shards copies?)")
    by_number = defaultdict(list)
    for rank, number in zip(dist.get_process_group_ranks(group), numbers.tolist(), strict=True):
        by_number[number].append(rank)
    alike = next((ranks for number, ranks in by_number.items() if number and len(ranks) > 1), None)
    if alike is None:
        return None
    return (
        f"{rank_failures.people(alike)} hold the very same elements of every parameter, but were told to hold "
        "different parts: each would count. Under FSDP1 with ShardingStrategy.HYBRID_SHARD, and wherever groups of "
        "ranks hold the whole model each, process_group= must be the group of one copy: model.process_group"
    )


def to_compare(layout: Layout, group: dist.ProcessGroup) -> tuple[dict[int, int], int]:
    """What replicas must hold alike, as numbers for ``ids_apart`` by ``holders``, and how many of those there are."""
    shards = _copies(layout, group)
    return _by_holders(shards, fingerprint.fingerprints([_values(shard) for shard in shards])), _sets(layout)


def where_apart(layout: Layout, group: dist.ProcessGroup, device: torch.device, what: str) -> Difference | None:
    """Where ranks hold different bits of what should be copies. Collective, and the same on all ranks.

    Where the layout has no group all ranks must have parameters of the same names.
    """
    shards = _copies(layout, group)
    return _compare(layout, shards, [_values(shard) for shard in shards], group, device, what)


def _copies(layout: Layout, group: dist.ProcessGroup) -> list[HeldShard]:
    """This rank's shards that others hold too, by replica_id. Without a group every rank should hold everything."""
    if layout.group is not None:
        return sorted((shard for shard in layout.shards if shard.replica_id >= 0), key=lambda shard: shard.replica_id)
    first, shards = dist.get_rank(group) == 0, sorted(layout.shards, key=lambda shard: shard.key)
    return [replace(shard, replica_id=i, holders=0, owned=first) for i, shard in enumerate(shards)]


def _sets(layout: Layout) -> int:
    return 1 if layout.group is None else layout.holder_sets


def _by_holders(shards: Sequence[HeldShard], numbers: Sequence[int]) -> dict[int, int]:
    """For each set of ranks one number for all that they hold together; of what is not in memory UNKNOWN."""
    held = defaultdict(list)
    for shard, number in zip(shards, numbers, strict=True):
        held[shard.holders].append(number)
    return {
        holders: UNKNOWN if all(number == UNKNOWN for number in of_all) else fingerprint.joined(of_all)
        for holders, of_all in held.items()
    }


def _values(shard: HeldShard) -> Tensor | None:
    return _elements(shard, local(shard.param))


def _elements(shard: HeldShard, tensor: Tensor | None) -> Tensor | None:
    """A shard's elements in its optimizer parameter's local tensor or gradient; None where they are not in memory."""
    start, numel = shard.start, shard.numel
    if tensor is None or tensor.layout != torch.strided or tensor.numel() < start + numel:
        return None
    return tensor if tensor.numel() == numel else tensor.reshape(-1)[start : start + numel]


def _compare(
    layout: Layout,
    shards: Sequence[HeldShard],
    tensors: Sequence[Tensor | None],
    group: dist.ProcessGroup,
    device: torch.device,
    what: str,
) -> Difference | None:
    """Where ranks hold different bits of one shard: ``tensors`` is what this one holds of each. Collective.

    ``device`` is that of what is sent, ``what`` the name where it fails.
    """
    fingerprints = fingerprint.fingerprints(tensors)
    if not ids_apart(_by_holders(shards, fingerprints), _sets(layout), group, device, what):
        return None
    numbers = {shard.replica_id: number for shard, number in zip(shards, fingerprints, strict=True)}
    apart = ids_apart(numbers, layout.replicas if layout.group is not None else len(shards), group, device, what)
    if not apart:
        return None
    mine = {shard.replica_id: (shard, tensor) for shard, tensor in zip(shards, tensors, strict=True)}
    off = _deviations([mine.get(id) for id in apart[:DESCRIBED]], group, device, what)
    worst = apart[int(off.argmax())]
    here = (mine[worst][0].key, numbers[worst]) if numbers.get(worst, UNKNOWN) != UNKNOWN else None
    told: list[Any] = [None] * dist.get_world_size(group)
    with rank_failures.explaining(what, group):
        dist.all_gather_object(told, here, group=group)
    holders = defaultdict(list)
    for rank, entry in zip(dist.get_process_group_ranks(group), told, strict=True):
        if entry is not None:
            holders[entry].append(rank)
    key = min(key for key, _ in holders)
    return Difference(key, len(apart) - 1, tuple(map(tuple, holders.values())), float(off.max()))


def _deviations(
    held: Sequence[tuple[HeldShard, Tensor | None] | None], group: dist.ProcessGroup, device: torch.device, what: str
) -> Tensor:
    """The largest relative deviation of any rank from the owner, float64 (n,) on the CPU, of n shards. Collective."""
    sketches = {}
    for row, (shard, tensor) in ((row, entry) for row, entry in enumerate(held) if entry is not None):
        sketch = fingerprint.sketch(tensor)
        if sketch is not None:
            sketches[row] = shard.owned, sketch
    first = torch.zeros(len(held), fingerprint.BUCKETS + 1, dtype=torch.float64, device="cpu")
    for row, (owned, sketch) in sketches.items():
        if owned:
            first[row, :-1], first[row, -1] = sketch, 1.0
    first = _reduced(first, dist.ReduceOp.SUM, group, device, what)
    off = torch.zeros(len(held), dtype=torch.float64, device="cpu")
    for row, (_, sketch) in sketches.items():
        owners = first[row, :-1]
        if first[row, -1]:
            deviation = (sketch - owners).norm() / torch.maximum(sketch.norm(), owners.norm())
            off[row] = deviation.nan_to_num(nan=math.inf)
    return _reduced(off, dist.ReduceOp.MAX, group, device, what)


def ids_apart(
    numbers: Mapping[int, int], count: int, group: dist.ProcessGroup, device: torch.device, what: str
) -> list[int]:
    """The ids, of ``count``, for which two ranks have different numbers, ascending. Collective.

    A rank may have no number for an id, or UNKNOWN.
    """
    apart: list[int] = []
    for first in range(0, count, IDS):
        bounds = torch.full((2, min(IDS, count - first)), UNKNOWN, device="cpu")
        for id, number in numbers.items():
            if first <= id < first + IDS and number != UNKNOWN:
                bounds[0, id - first], bounds[1, id - first] = number, -number
        largest, negated_smallest = _reduced(bounds, dist.ReduceOp.MAX, group, device, what)
        apart += (first + (largest != -negated_smallest).nonzero().squeeze(1)).tolist()
    return apart


def _reduced(
    tensor: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup, device: torch.device, what: str
) -> Tensor:
    """The all-reduced tensor, on the CPU."""
    tensor = tensor.to(device)
    with rank_failures.explaining(what, group):
        dist.all_reduce(tensor, op=operation, group=group)
    return tensor.cpu()
