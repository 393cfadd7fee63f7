"""Plain tensors: whole parameters that every rank holds (one process, DDP), or shards that only the user can name."""

from __future__ import annotations

from torch import Tensor

from . import Shard


def shards(param: Tensor, key: str, rank: int | None = None) -> list[Shard]:
    """The one shard of a plain tensor: the whole of it, or where ``rank`` is given the part of that rank."""
    if rank is None:
        return [Shard(key, (), 0, param.numel(), param.numel())]
    return [Shard(key, (rank,), 0, param.numel(), None)]
