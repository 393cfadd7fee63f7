"""DTensors: FSDP2, HSDP and tensor parallel. The mesh and the placements say which part a rank holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import Shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def shards(param: "DTensor", key: str) -> list[Shard]:
    """The one shard of a DTensor, named by the rank's coordinate on every mesh dimension that splits it.

    Replicate dimensions don't take part, so the replicas of HSDP have equal parts.

    Raises:
        ValueError: a placement is Partial: the local values are summands, not elements.
    """
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"parameter {key!r} is a DTensor with placements {param.placements}: Partial holds summands, not elements. "
            "Redistribute it to Shard or Replicate before building the optimizer"
        )
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is outside the parameter's mesh and holds nothing of it
        return [Shard(key, ("outside",), 0, 0, param.numel())]
    return [Shard(key, place(param.placements, coordinate), 0, param.to_local().numel(), param.numel())]


def place(placements: Sequence["Placement"], coordinate: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(mesh dimension, coordinate) for every dimension that splits the tensor."""
    return tuple((dim, coordinate[dim]) for dim, placement in enumerate(placements) if not placement.is_replicate())
