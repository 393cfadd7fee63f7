"""A model cut over ranks in any way, and which elements of it this rank then holds.

To know that, a model whose values are the numbers of its elements is cut the same way, whatever cuts it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from alphaadam_dist.shards import clean_name
from tests.older import distributed

from ..equality.pieces import local
from .programs import NEEDS_GROUP, Unit


@dataclass
class Ground:
    """The ranks that a unit lives on, all or an island of them, and this rank's place there."""

    island: int
    rank: int
    world: int
    mesh: DeviceMesh | None
    group: dist.ProcessGroup | None


def ground(islands: int, idle: int) -> Ground | None:
    """This rank's; None where it is idle."""
    if not dist.is_initialized():
        return Ground(0, 0, 1, None, None)
    rank, size = dist.get_rank(), (dist.get_world_size() - idle) // islands
    if islands == 1 and not idle:
        return Ground(0, rank, size, init_device_mesh("cpu", (size,)), dist.group.WORLD)
    meshes = [DeviceMesh("cpu", list(range(i * size, (i + 1) * size))) for i in range(islands)]  # on every rank
    if rank >= islands * size:
        return None
    over = meshes[rank // size]
    return Ground(rank // size, rank % size, size, over, over.get_group())


@dataclass
class Sharded:
    """This rank's tensors by name, for each which elements of the flat model it holds (-1 is padding), and the options
    that tell the optimizer so. ``module`` is FSDP's, whose tensors live as long as it."""

    named: dict[str, Tensor]
    index: dict[str, Tensor]
    told: dict[str, Any]
    module: Any


def shard(unit: Unit, regime: str, on: Ground, values: dict[str, Tensor]) -> Sharded:
    numbers, count = {}, 1
    for name, value in values.items():
        numbers[name] = torch.arange(count, count + value.numel(), dtype=value.dtype).view(value.shape)
        count += value.numel()
    index, _ = _cut(unit, regime, on, numbers)
    named, module = _cut(unit, regime, on, values)
    at = {name: local(tensor).detach().reshape(-1).long() - 1 for name, tensor in index.items()}
    told: dict[str, Any] = {"sharding": "sharded"} if regime == "by-hand" and on.world > 1 else {}
    if on.group is not None and (unit.with_group or regime in NEEDS_GROUP):
        told["process_group"] = module.process_group if regime == "fsdp1-hybrid" else on.group
    return Sharded(named, at, told, module)


class Model(nn.Module):
    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.clone()))


def _cut(unit: Unit, regime: str, on: Ground, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    chance = random.Random(unit.seed)
    if unit.strided:
        values = {n: v.transpose(0, -1).contiguous().transpose(0, -1) if v.ndim else v for n, v in values.items()}
    if regime in ("alone", "replicas"):
        return dict(Model(values).named_parameters()), None
    if regime == "stages":  # the first parameter is on all of them, as tied ones are
        held = {n: v for i, (n, v) in enumerate(values.items()) if i % on.world == on.rank or i == 0}
        return dict(Model(held).named_parameters()), None
    if regime == "by-hand":
        parts = {}
        for name, value in values.items():
            cuts = [0, *sorted(chance.randint(0, value.numel()) for _ in range(on.world - 1)), value.numel()]
            parts[name] = value.reshape(-1)[cuts[on.rank] : cuts[on.rank + 1]]
        return dict(Model(parts).named_parameters()), None
    assert on.mesh is not None
    if regime == "dtensors":
        over = _square(("a", "b")) if on.world == 4 and chance.random() < 0.5 else on.mesh
        placed = {name: _anywhere(value, over, chance) for name, value in values.items()}
        return dict(Model(placed).named_parameters()), None
    model: nn.Module = Model(values)
    if regime == "fsdp1-hybrid":
        over, strategy = _square(("replicate", "shard")), ShardingStrategy.HYBRID_SHARD
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(
            model, device_mesh=over, sharding_strategy=strategy, device_id=cpu, use_orig_params=True
        )
    elif regime.startswith("fsdp1"):
        original = regime == "fsdp1-original"
        model = FullyShardedDataParallel(model, on.group, device_id=torch.device("cpu"), use_orig_params=original)
    elif regime == "tp-fsdp2":
        over = _square(("dp", "tp"))
        model = Model({name: _anywhere(value, over["tp"], chance) for name, value in values.items()})
        fully_shard(model, mesh=over["dp"])
    elif regime == "hsdp":
        replicas = chance.choice([n for n in (1, 2, 4) if on.world % n == 0])
        fully_shard(model, mesh=init_device_mesh("cpu", (replicas, on.world // replicas), mesh_dim_names=("r", "s")))
    else:
        columns = chance.random() < 0.3
        last = {p: Shard(p.ndim - 1) for p in model.parameters() if columns and p.shape[-1] % on.world == 0}
        fully_shard(model, mesh=on.mesh, shard_placement_fn=last.get)
    return {clean_name(name): param for name, param in model.named_parameters()}, model


def _square(names: tuple[str, str]) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def _anywhere(value: Tensor, over: DeviceMesh, chance: random.Random) -> DTensor:
    placements = [chance.choice([Replicate(), *(Shard(d) for d in range(value.ndim))]) for _ in range(over.ndim)]
    return distributed(value, over, placements)
