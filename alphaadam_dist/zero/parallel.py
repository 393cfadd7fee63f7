"""What an engine's ranks hold of the model beside what ZeRO divides: experts, tensor-parallel parts, pipeline stages.

Two ranks' parameters of one name may be one parameter (replicas), two (DeepSpeed's experts, named alike on every
expert-parallel rank), or parts of one (AutoTP). A layer that a PipelineModule ties lies on several stages, each of
which divides its parameters by itself; DeepSpeed marks all copies but the first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from torch import Tensor

from ..shards import Shard, clean_names
from . import older


def by_tensor(engine: Any) -> bool:
    """AutoTP has split parameters."""
    return older.asked(engine, "autotp_size", 1) > 1


def group(engine: Any) -> dist.ProcessGroup | None:
    """The ranks that hold the whole model, where those of the ZeRO wrapper hold a part of it; else None."""
    return dist.group.WORLD if by_tensor(engine) or isinstance(engine.module, PipelineModule) else None


def named_parameters(engine: Any) -> list[tuple[str, Tensor]]:
    """The parameters of the engine's module by their names in the bare model."""
    named = list(engine.module.named_parameters())
    clean = clean_names(name for name, _ in named)
    return [(clean[name], param) for name, param in named]


def with_other_stages(engine: Any, names: Mapping[Tensor, Sequence[str]]) -> dict[Tensor, Sequence[str]]:
    """The names of a rank's parameters and, under empty tensors, of those that other pipeline stages hold. Collective
    under a PipelineModule.
    """
    held = {tuple(of_one) for of_one in names.values()}
    elsewhere = set().union(*_of_all_stages(engine, held)) - held
    return {**names, **{torch.empty(0, device="meta"): of_one for of_one in sorted(elsewhere)}}


def stages_differ(engine: Any, value: Any) -> bool:
    """Some pipeline stage has another value than this one. Collective under a PipelineModule."""
    return any(other != value for other in _of_all_stages(engine, value))


def _of_all_stages(engine: Any, value: Any) -> list[Any]:
    return _of_all(value, dist.group.WORLD) if isinstance(engine.module, PipelineModule) else [value]


def _of_all(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What each rank of a group gave. Collective."""
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    return told


def keys(engine: Any) -> dict[Tensor, str]:
    """The name of every parameter, made different for experts that share a local name across ranks."""
    return {param: _key(name, _expert_rank(param)) for name, param in named_parameters(engine)}


def keys_of_all_ranks(engine: Any) -> Iterator[str]:
    """``keys`` of this rank and of the others: experts of equal local names live on every expert-parallel rank."""
    for name, param in named_parameters(engine):
        rank = _expert_rank(param)
        world = 1 if rank is None else dist.get_world_size(_expert_group(param))
        for other in range(world):
            yield _key(name, None if rank is None else other)


def in_the_model(engine: Any, shards: Sequence[Sequence[Shard]]) -> list[list[Shard]]:
    """What ZeRO's shards, which are of this rank's parameters, are of the model's. Collective under AutoTP."""
    param_of = {key: param for param, key in keys(engine).items()}
    numels = _whole_numels(engine, param_of) if by_tensor(engine) else {}

    def placed(shard: Shard) -> Shard:
        if shard.key in numels:
            at = ("tensor", groups.get_tensor_model_parallel_rank(), shard.place)
            return replace(shard, place=at, global_numel=numels[shard.key], positions=None)
        return replace(shard, counted=not getattr(param_of.get(shard.key), "ds_pipe_replicated", False))

    return [[placed(shard) for shard in held] for held in shards]


def _whole_numels(engine: Any, param_of: dict[str, Any]) -> dict[str, int]:
    """Elements of each parameter that AutoTP has split, on all tensor-parallel ranks together. Collective."""
    split = {key: param for key, param in param_of.items() if is_model_parallel_parameter(param)}
    mine = {key: getattr(param, "ds_numel", param.numel()) for key, param in split.items()}
    told = _of_all(mine, groups.get_tensor_model_parallel_group())
    return {key: sum(of_rank.get(key, 0) for of_rank in told) for key in mine}


def _key(name: str, expert_rank: int | None) -> str:
    return name if expert_rank is None else f"{name}[expert rank {expert_rank}]"


def _expert_group(param: Any) -> dist.ProcessGroup:
    return groups._get_expert_parallel_group(param.group_name)


def _expert_rank(param: Any) -> int | None:
    return None if getattr(param, "allreduce", True) else dist.get_rank(_expert_group(param))
