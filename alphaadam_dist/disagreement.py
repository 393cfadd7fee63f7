"""Do all ranks hold the same statistics and options? ``verify_every=N`` asks every N steps.

They must, or each rank gives its part of the model another alpha, and no error says so: a rank built with another
option, one that loaded another checkpoint, a replica whose moments have drifted, a bit that flipped. One all-reduce of
16 bytes compares a checksum; only where it differs do the ranks tell each other what they hold.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import lost, options
from .counts import Statistics
from .ownership import Layout, statistics_device

if TYPE_CHECKING:
    from .optimizer import AlphaOptimizer


def check(optimizer: AlphaOptimizer, layout: Layout, statistics: Statistics) -> None:
    """Compare with the other ranks, replicas too, what must be equal on all. Collective; synchronises.

    Raises:
        RuntimeError: on every rank, with the values that differ and the ranks that hold them.
    """
    group = layout.group or optimizer.process_group or (dist.group.WORLD if dist.is_initialized() else None)
    if group is None or dist.get_world_size(group) == 1:
        return
    when = f"before this process's step {statistics.opened}"
    held = _held(optimizer, statistics)
    mine = zlib.crc32(repr(held).encode())  # of the repr, so that NaN equals itself
    bounds = torch.tensor([mine, -mine], device=statistics_device(layout.params, group))
    try:
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    except RuntimeError as error:
        raise lost.explained(error, f"check that the ranks agree {when}", group) from error
    largest, smallest = bounds[0], -bounds[1]
    if bool(largest == smallest):
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, {name: repr(value) for name, value in held.items()}, group=group)
    ranks = dist.get_process_group_ranks(group)
    names = dict.fromkeys(name for theirs in everyone for name in theirs)
    differences = [_difference(name, [theirs.get(name, "missing") for theirs in everyone], ranks) for name in names]
    raise RuntimeError(
        f"verify_every: the ranks disagree {when}: {'; '.join(d for d in differences if d)}. Build every rank with the "
        "same options and let all go on from the same checkpoint; where that was so, a rank has computed another thing "
        "than the others"
    )


def _held(optimizer: AlphaOptimizer, statistics: Statistics) -> dict[str, Any]:
    held: dict[str, Any] = dict(zip(("T", "alpha", "A", "C"), statistics.state(), strict=True))
    if optimizer.defaults["scope"] == "layer":
        held["alpha by layer"] = statistics.alphas()
    held |= {name: optimizer.defaults[name] for name in options.SHARED}
    if optimizer.process_group is None:  # pipeline stages may have groups of their own
        for i, group in enumerate(optimizer.param_groups):
            values = {name: group[name] for name in optimizer.hyperparameters}
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
    return f"{name} is " + " but ".join(f"{value} on {lost.people(held)}" for value, held in parts)
