"""Do all ranks hold the same statistics and options? ``verify_every=N`` asks every N steps.

They must, or each rank gives its part of the model another alpha, and no error says so: a rank built with another
option, one that loaded another checkpoint, a replica whose moments have drifted, a bit that flipped. Replicas should
hold the same parameters too; where they do not there is a warning, for some are meant to drift. One all-reduce compares
checksums: 16 bytes, and 16 for each set of ranks that hold the same shards. Only where some differ do the ranks tell
each other what they hold.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from . import options, rank_failures, replicas
from .kernels import consensus
from .layout import Layout, statistics_device
from .persistence import Persistent
from .statistics import Statistics


def check(optimizer: Persistent, layout: Layout, statistics: Statistics) -> None:
    """Compare with the other ranks, replicas too, what must be equal on all. Collective; synchronises.

    Warns, once, where replicas hold different parameters.

    Raises:
        RuntimeError: on every rank, with the values that differ and the ranks that hold them.
        ValueError: the same, where replicas hold different parameters at the start of a run.
    """
    group = layout.group or optimizer.process_group or (dist.group.WORLD if dist.is_initialized() else None)
    if group is None or dist.get_world_size(group) == 1:
        return
    device = statistics_device(layout.params, group)
    what = f"check that the ranks agree before this process's step {statistics.opened}"
    held = _held(optimizer, layout, statistics)
    numbers, count = ({}, 0) if layout.drift_told else replicas.to_compare(layout, group)
    # of the repr, so that NaN equals itself
    of_all = {0: zlib.crc32(repr(held).encode()), **{1 + place: number for place, number in numbers.items()}}
    apart = replicas.ids_apart(of_all, 1 + count, group, device, what)
    if 0 in apart:
        raise _disagreement(held, group, what)
    difference = replicas.where_apart(layout, group, device, what) if apart else None
    if difference is not None:
        fresh = replicas.is_fresh(optimizer, group, device, first=statistics.opened == 1)
        replicas.report(layout, f"verify_every: {replicas.not_copies(difference)}", fresh=fresh)


def _disagreement(held: Mapping[str, Any], group: dist.ProcessGroup, what: str) -> RuntimeError:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    with rank_failures.explaining(what, group):
        dist.all_gather_object(everyone, {name: repr(value) for name, value in held.items()}, group=group)
    ranks = dist.get_process_group_ranks(group)
    names = dict.fromkeys(name for theirs in everyone for name in theirs)
    differences = [_difference(name, [theirs.get(name, "missing") for theirs in everyone], ranks) for name in names]
    when = what.removeprefix("check that the ranks agree ")
    return RuntimeError(
        f"verify_every: the ranks disagree {when}: {'; '.join(d for d in differences if d)}. Build every rank with the "
        "same options and let all go on from the same checkpoint; where that was so, a rank has computed another thing "
        "than the others"
    )


def _held(optimizer: Persistent, layout: Layout, statistics: Statistics) -> dict[str, Any]:
    held: dict[str, Any] = dict(zip(("T", "alpha", "A", "C"), statistics.state(), strict=True))
    held["n"] = optimizer._run.n
    chosen = optimizer._run.options
    if chosen.scope == "layer":
        held["alpha by layer"] = statistics.alphas()
    held |= {name: getattr(chosen, name) for name in options.SHARED}
    held["kernels"] = consensus.taken(chosen, layout)
    if layout.group is None:
        names = zlib.crc32(repr(sorted(shard.key for shard in layout.shards)).encode())
        held["parameters"] = f"{len(layout.shards)} of {layout.numel} elements, checksum of their names {names:08x}"
    if optimizer.process_group is None:  # pipeline stages may have groups of their own
        for i, group in enumerate(optimizer.param_groups):
            values = {name: group[name] for name in optimizer.group_keys()}
            held |= {f"{name} of group {i}": float(v) if name == "lr" else v for name, v in values.items()}
    return held


def _difference(name: str, values: Sequence[str], ranks: Sequence[int]) -> str:
    """Who holds which value, the rarest first; nothing where all hold the same."""
    holders: dict[str, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return ""
    parts = sorted(holders.items(), key=lambda item: len(item[1]))
    return f"{name} is " + " but ".join(f"{value} on {rank_failures.people(held)}" for value, held in parts)
