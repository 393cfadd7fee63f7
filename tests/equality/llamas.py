"""The small Llama under every sharding of PyTorch, trained on real batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy

from alphaadam_dist import AlphaAdam
from alphaadam_dist.verify import shardings
from alphaadam_dist.verify.model import Llama, next_token_loss, token_batches

from .. import threads
from . import pieces

CPU = torch.device("cpu")
LR = 1e-3
SHAPES = pieces.shapes_of(Llama(layers=1))


@dataclass(frozen=True)
class Regime:
    """``shard`` puts a Llama under it and says over which mesh batches are split (None: all ranks)."""

    shard: Callable[[Llama], tuple[nn.Module, DeviceMesh | None]]
    world: int = 4
    needs_group: bool = False


def mesh(*shape: int) -> DeviceMesh:
    names = {1: ("dp",), 2: ("dp", "tp"), 3: ("replicate", "dp", "tp")}[len(shape)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _fsdp2(**options: Any) -> Regime:
    return Regime(lambda model: (shardings.fsdp2(model, mesh(4), **options), None))


def _hsdp(model: Llama) -> tuple[nn.Module, None]:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return shardings.fsdp2(model, both), None


def _tensor(shape: tuple[int, ...], *, sequence: bool) -> Regime:
    def shard(model: Llama) -> tuple[nn.Module, DeviceMesh]:
        whole = mesh(*shape)
        shardings.tensor_parallel(model, whole["tp"], sequence=sequence)
        data = whole["replicate", "dp"] if len(shape) == 3 else whole["dp"]
        if data.size() > 1:
            shardings.fsdp2(model, data)
        return model, data

    world = int(torch.tensor(shape).prod())
    return Regime(shard, world)


def _fsdp1(original: bool) -> Regime:
    def shard(model: Llama) -> tuple[nn.Module, None]:
        return shardings.fsdp1(model, CPU, original=original), None

    return Regime(shard, needs_group=True)


def _ddp(model: Llama) -> tuple[nn.Module, None]:
    return nn.parallel.DistributedDataParallel(model), None


REGIMES: dict[str, Regime] = {
    "plain": Regime(lambda model: (model, mesh(1)), world=1),
    "ddp": Regime(_ddp),
    "fsdp2": _fsdp2(),
    "fsdp2-cpu-offload": _fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "hsdp": Regime(_hsdp),
    "tp": _tensor((1, 4), sequence=False),
    "tp-sequence": _tensor((1, 2), sequence=True),
    "tp2-fsdp2-norms-plain": _tensor((2, 2), sequence=False),
    "tp2-fsdp2-norms-dtensor": _tensor((2, 2), sequence=True),
    "hsdp-tp": _tensor((2, 1, 2), sequence=True),
    "fsdp1-original": _fsdp1(original=True),
    "fsdp1-flat": _fsdp1(original=False),
}


def share(batch: Tensor, data: DeviceMesh | None) -> Tensor:
    """This rank's part of a batch."""
    if data is None:
        return batch.chunk(dist.get_world_size())[dist.get_rank()]
    count, index = 1, 0
    for dim, size in enumerate(data.shape):
        count, index = count * size, index * size + data.get_local_rank(dim)
    return batch.chunk(count)[index]


def train(regime: str, options: dict[str, Any] | None, steps: int = 20) -> dict[str, Any]:
    """On a rank: the Llama trained under a regime, by torch's AdamW where there are no options of AlphaAdam."""
    start = REGIMES[regime]
    model, data = start.shard(Llama(layers=1))
    if options is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=LR, foreach=False)
    else:
        extra = {"process_group": dist.group.WORLD} if start.needs_group else {}
        optimizer = AlphaAdam(model.named_parameters(), **{"lr": LR, **options, **extra})
    seen, collectives = [], []
    for batch in token_batches(steps, 8):
        mine = share(batch, data)
        next_token_loss(model(mine), mine).backward()
        with threads.Collectives() as counted:
            optimizer.step()
        optimizer.zero_grad()
        collectives.append(counted.seen)
        if isinstance(optimizer, AlphaAdam):
            seen.append((optimizer.alpha, optimizer.agreement))
    return {"seen": seen, "collectives": collectives, "params": pieces.of_model(model, SHAPES)}


def deviation(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 over the whole model."""
    squared = sum(((a[name].double() - b[name].double()).square().sum() for name in b), torch.zeros(()))
    return float((squared / sum(b[name].double().square().sum() for name in b)).sqrt())
