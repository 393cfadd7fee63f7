"""DTensors: FSDP2, HSDP and tensor parallel. The mesh and the placements say which part a rank holds."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..rounding import Positions
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
    at = place(param.placements, coordinate)
    numel = param.to_local().numel()
    return [Shard(key, at, 0, numel, param.numel(), positions=positions(param, coordinate))]


def place(placements: Sequence["Placement"], coordinate: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(mesh dimension, coordinate) for every dimension that splits the tensor."""
    return tuple((dim, coordinate[dim]) for dim, placement in enumerate(placements) if not placement.is_replicate())


def positions(param: "DTensor", coordinate: Sequence[int]) -> Positions | None:
    """Where a rank's elements stand in the flattened tensor; None where they are no rows of one length and distance.

    That is so where two dimensions are split and neither is the first, or where an uneven split leaves a rank several
    runs of one dimension.
    """
    return _positions(
        tuple(param.shape), tuple(param._local_tensor.shape), tuple(param.placements), tuple(param.device_mesh.shape),
        tuple(coordinate),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)  # half a millisecond each; the layers of a model have few shapes
def _positions(
    shape: tuple[int, ...], local: tuple[int, ...], placements: tuple["Placement", ...], mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> Positions | None:  # fmt: skip
    starts, sizes = [], []
    for dim, size in enumerate(shape):
        held = torch.arange(size, device="cpu")
        for placement, parts, part in zip(placements, mesh, coordinate, strict=True):
            if not placement.is_replicate() and placement.dim == dim:  # type: ignore[attr-defined]
                held = _split(held, placement, parts, part)
        if bool((held.diff() != 1).any()):
            return None
        starts.append(int(held[0]) if len(held) else 0)
        sizes.append(len(held))
    if tuple(sizes) != local:
        return None
    split = [dim for dim, size in enumerate(sizes) if size != shape[dim]]
    last = split[-1] if split else 0
    if len(split) > 2 or (len(split) == 2 and math.prod(sizes[: split[0]]) > 1):
        return None
    start = sum(first * math.prod(shape[dim + 1 :]) for dim, first in enumerate(starts))
    return Positions(start, max(math.prod(sizes[last:]), 1), max(math.prod(shape[last:]), 1))


def _split(held: torch.Tensor, placement: "Placement", parts: int, part: int) -> torch.Tensor:
    """What one of ``parts`` holds of the indices of a dimension. A strided shard takes its part of each of several."""
    groups = held.chunk(getattr(placement, "split_factor", 1))
    pieces = [group.chunk(parts) for group in groups]
    return torch.cat([piece[part] if part < len(piece) else held[:0] for piece in pieces])
