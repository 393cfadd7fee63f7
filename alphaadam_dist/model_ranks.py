"""Which ranks are the model? Decided from what a rank knows by itself, so that none waits for one that has no part."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from .rank_failures import people
from .shards import Shard
from .tensors import is_dtensor


def reduce_group(
    param_groups: Sequence[Mapping[str, Any]], shards: Sequence[Sequence[Shard]], given: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The group to reduce over; None where this rank holds the whole model and nothing needs reducing.

    Args:
        param_groups: the optimizer's.
        shards: of each parameter.
        given: the optimizer's ``process_group``.

    Raises:
        ValueError: the group is without this rank; or none is given, and the meshes leave some rank of the world out.
    """
    if given is not None:
        if dist.get_rank(given) < 0:
            raise ValueError(
                f"process_group is a group without this rank, {dist.get_rank()}: build the optimizer on its ranks "
                "only, or give one that has this rank too (it may hold nothing of the model)"
            )
        return given if dist.get_world_size(given) > 1 else None
    whole = all(shard.replicated for held in shards for shard in held)
    if whole and not param_groups[0]["verify_every"]:
        return None
    world = dist.get_world_size() if dist.is_initialized() else 1
    ranks = _of_meshes(param_groups)
    if 0 < len(ranks) < world:
        raise ValueError(
            f"the meshes of this model's DTensors have {people(sorted(ranks))} of a world of {world}, and "
            "process_group=None: it cannot be told which ranks are the model. Give the optimizer process_group=. If "
            "these ranks hold the whole model (others may hold another one, a copy of it or nothing): the group of "
            "these ranks, mesh.get_group() where the mesh has one dimension, else torch.distributed.new_group(). If "
            "they hold one pipeline stage: the group of all stages, with names that are unique in the whole model"
        )
    return None if whole or world == 1 else dist.group.WORLD


def _of_meshes(param_groups: Sequence[Mapping[str, Any]]) -> set[int]:
    params = [param for group in param_groups for param in group["params"]]
    meshes = {param.device_mesh for param in params if is_dtensor(param)}
    return {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
