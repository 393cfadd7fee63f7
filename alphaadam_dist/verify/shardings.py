"""How the Llama is put under each sharding of PyTorch, as a user would do it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from ..shards import clean_names
from . import experts, pipelined
from .model import HEADS, Block, Llama
from .settings import CLIPPED, DELAYED, EXACT, LAYER, LION, LOOKAHEAD, REFERENCE, SGD, THRESHOLD, Setting
from .trainee import Trainee, of_module


@dataclass(frozen=True)
class Sharding:
    """One way to shard: for which world sizes, and how.

    Attributes:
        needs_group: AlphaAdam is told the process group.
        settings: what is tried of the optimizer.
        trainee: what drives the sharded model.
        experts: the model is the one with experts.
    """

    name: str
    possible: Callable[[int], bool]
    shard: Callable[[Llama, torch.device], nn.Module]
    needs_group: bool = False
    settings: Sequence[Setting] = (EXACT, DELAYED, LAYER, CLIPPED)
    trainee: Callable[[nn.Module, Optimizer], Trainee] = lambda model, optimizer: of_module(
        model, optimizer, full_parameters
    )
    experts: bool = False

    def options(self) -> dict[str, Any]:
        return {"process_group": dist.group.WORLD} if self.needs_group else {}


def fsdp2(model: Llama, mesh: DeviceMesh, **options: Any) -> Llama:
    """fully_shard every layer, then the rest. A mesh of two dimensions is HSDP: (replicate, shard)."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def fsdp1(model: Llama, device: torch.device, *, original: bool) -> nn.Module:
    """FullyShardedDataParallel over all ranks, a unit for every layer. ``original`` is its ``use_orig_params``."""
    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device, use_orig_params=original)


def tensor_parallel(model: Llama, mesh: DeviceMesh, *, sequence: bool) -> Llama:
    """Split heads, inner widths and the vocabulary. ``sequence`` splits activations too: norms become DTensors."""
    between = Shard(1) if sequence else Replicate()
    outer: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    inner: dict[str, ParallelStyle] = {
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.o": RowwiseParallel(output_layouts=between),
        "feed_forward.gate": ColwiseParallel(),
        "feed_forward.up": ColwiseParallel(),
        "feed_forward.down": RowwiseParallel(output_layouts=between),
    }
    if sequence:
        outer["norm"] = SequenceParallel()
        for name in ("attention", "feed_forward"):
            inner[f"{name}_norm"] = SequenceParallel()
            inner[name] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    parallelize_module(model, mesh, outer)
    for layer in model.layers:
        parallelize_module(layer, mesh, inner)
    return model


def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The whole parameters by their clean names, copied to the CPU. Collective."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield from [(name, param.detach().cpu().clone()) for name, param in _named(model)]
        return
    for name, param in _named(model):
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        yield name, whole.detach().cpu().clone()


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = list(model.named_parameters())
    clean = clean_names(name for name, _ in named)
    return [(clean[name], param) for name, param in named]


def _halves(device: torch.device, names: tuple[str, str]) -> DeviceMesh:
    return init_device_mesh(device.type, (2, dist.get_world_size() // 2), mesh_dim_names=names)


def _tensor_and_fsdp2(model: Llama, device: torch.device) -> Llama:
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world // 2, 2), mesh_dim_names=("dp", "tp"))
    return fsdp2(tensor_parallel(model, mesh["tp"], sequence=False), mesh["dp"])


def _experts_and_fsdp2(model: Llama, device: torch.device) -> Llama:
    experts.shard_experts(model, device)
    return fsdp2(model, _whole(device))


def _whole(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (dist.get_world_size(),))


SHARDINGS = (
    Sharding("DDP", lambda world: True, lambda model, device: nn.parallel.DistributedDataParallel(model)),
    Sharding("FSDP1", lambda world: world > 1, lambda model, device: fsdp1(model, device, original=True), True),
    Sharding("FSDP1 flat", lambda world: world > 1, lambda model, device: fsdp1(model, device, original=False), True),
    Sharding(
        "FSDP2",
        lambda world: True,
        lambda model, device: fsdp2(model, _whole(device)),
        settings=(EXACT, DELAYED, LAYER, CLIPPED, THRESHOLD, LOOKAHEAD, REFERENCE, LION, SGD),
    ),
    Sharding(
        "HSDP, 2 replicas",
        lambda world: world >= 4 and world % 2 == 0,
        lambda model, device: fsdp2(model, _halves(device, ("replicate", "shard"))),
    ),
    Sharding(
        "TP",
        lambda world: world > 1 and HEADS % world == 0,
        lambda model, device: tensor_parallel(model, _whole(device), sequence=False),
    ),
    Sharding("TP 2 x FSDP2", lambda world: world >= 4 and world % 2 == 0, _tensor_and_fsdp2),
    Sharding(
        "EP 2 x FSDP2",
        lambda world: world % 2 == 0,
        _experts_and_fsdp2,
        settings=(EXACT, DELAYED),
        experts=True,
    ),
    Sharding(
        "pipeline 2 x 2",
        lambda world: world % 2 == 0,
        pipelined.keep_parts,
        True,
        (EXACT, DELAYED),  # by layer a rank knows the alphas of its own parts
        pipelined.trainee,
    ),
)
