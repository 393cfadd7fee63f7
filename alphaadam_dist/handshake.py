"""What the ranks of a model tell each other when a layout is built, beside the table of shards in layout.py."""

from typing import Any

import torch
import torch.distributed as dist

from . import rank_failures


def first_to_say(value: Any, group: dist.ProcessGroup, device: torch.device, what: str) -> tuple[int, Any] | None:
    """The lowest rank whose value is not None, by its global number, and that value; the same on all. Collective.

    ``what`` this part of the handshake asks is said where the collective fails.
    """
    here, nowhere = dist.get_rank(group), dist.get_world_size(group)
    with rank_failures.explaining(f"handshake ({what})", group):
        first = torch.tensor(nowhere if value is None else here, device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
        if int(first) == nowhere:
            return None
        told = [value]
        dist.broadcast_object_list(told, group_src=int(first), group=group, device=device)
    return dist.get_process_group_ranks(group)[int(first)], told[0]


def stop_together(problem: str | None, group: dist.ProcessGroup | None, device: torch.device, what: str) -> None:
    """Raise ValueError on all ranks where one has a problem: none may wait for one that has stopped. Collective."""
    if group is not None:
        told = first_to_say(problem, group, device, what)
        if told is not None:
            problem = problem or f"rank {told[0]} of the reduce group found: {told[1]}"
    if problem is not None:
        raise ValueError(problem)
