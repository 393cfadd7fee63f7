"""Which kind of sharding a parameter is under, and so which file of this folder describes it."""

import torch.distributed as dist
from torch import Tensor

from ..rounding import consecutive
from ..tensors import is_dtensor
from . import Shard, dtensor, fsdp1


def shards_of(param: Tensor, key: str, *, named: bool, sharding: str, group: dist.ProcessGroup | None) -> list[Shard]:
    """The shards that an optimizer parameter of the name ``key`` holds on this rank.

    Args:
        named: ``key`` is the model's name for it, not a place in the optimizer's list.
        sharding, group: the optimizer's options of that name and ``process_group``.

    Raises:
        ValueError: it cannot be told which part of the model this is, with what the user must say.
    """
    if is_dtensor(param):
        return dtensor.shards(param, key)
    if sharding == "replicated":
        return _plain(param, key)
    if fsdp1.marked(param):
        return fsdp1.shards(param, key, None if group is None and sharding == "auto" else _rank(sharding, group))
    if sharding == "sharded":
        return _plain(param, key, _rank(sharding, group))
    if group is not None and not named:
        raise ValueError(
            f"process_group={group!r} with plain tensors that have no names: on another pipeline stage {key!r} may be "
            "another parameter. Give the optimizer model.named_parameters()"
        )
    return _plain(param, key)


def _plain(param: Tensor, key: str, rank: int | None = None) -> list[Shard]:
    """The one shard of a plain tensor: the whole of it, or where ``rank`` is given what that rank holds of it."""
    if rank is None:
        return [Shard(key, (), 0, param.numel(), param.numel(), positions=consecutive(0, param.numel()))]
    return [Shard(key, (rank,), 0, param.numel(), None)]


def _rank(sharding: str, group: dist.ProcessGroup | None) -> int:
    if not dist.is_initialized():
        raise ValueError(
            f"sharding={sharding!r} needs a process group: call torch.distributed.init_process_group() before building "
            "the optimizer, or leave sharding='auto' in one process"
        )
    return dist.get_rank(group)
