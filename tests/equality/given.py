"""The model of given gradients, sharded in every way there is: nothing but the sharding can make a difference.

Gradients have so few bits that averaging equal ones over a power of two of ranks is exact, so FSDP1 and DDP, which
must run a backward, get the same gradients as those that are simply handed theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from alphaadam_dist import AlphaAdam, parameter_groups
from alphaadam_dist.optimizer import AlphaOptimizer
from tests.models import Given, given_gradients
from tests.older import distributed

from .. import threads
from . import pieces

LR = 1e-2
CPU = torch.device("cpu")
SHAPES = pieces.shapes_of(Given())

SETTINGS: dict[str, dict[str, Any]] = {
    f"{name}-{threshold}": {**options, "threshold": threshold}
    for name, options in {
        "exact": {},
        "delayed": {"sync": "delayed", "alpha_warmup": 5},
        "layer": {"scope": "layer", "gamma": 0.2},
    }.items()
    for threshold in (0.0, 0.1)
} | {"fast": {"fused": True, "gamma": 0.1, "threshold": 0.05}}

AHEAD: dict[str, dict[str, Any]] = {
    "ahead": {"lookahead": 0.25},
    "ahead-delayed": {"lookahead": 0.25, "sync": "delayed", "gamma": 0.2, "fused": True},
    "ahead-alone": {"lookahead": 0.5, "gamma": 1.0, "fused": True},
    "ahead-clipped": {"lookahead": 0.5, "gamma": 1.0, "clip_norm": 1e6, "fused": True},
}
"""AlphaAdam's alone. The clipping cuts nothing: each sharding sums a norm in another order."""

GROUPS: list[dict[str, Any]] = [
    {"match": "^embedding$|^one$", "lr_scale": 4.0},
    {"match": "norm|bias", "weight_decay": 0.0, "lr_scale": 0.3},
]
"""Entries for parameter_groups that leave one parameter to the defaults."""


def mesh(**shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))


def distribute(model: nn.Module, over: DeviceMesh, *, norms: bool) -> None:
    """Split matrices as tensor parallelism does, one by columns; ``norms``: the rest as replicated DTensors."""
    for name, param in list(model.named_parameters()):
        if param.ndim > 1:
            placement: Any = Shard(1) if name == "weight" else Shard(0)
        elif norms:
            placement = Replicate()
        else:
            continue
        whole = distributed(param.detach(), over, [placement])
        setattr(model, name, nn.Parameter(whole, requires_grad=param.requires_grad))
    model.tied = model.embedding


def fsdp2(model: nn.Module, over: DeviceMesh, **options: Any) -> nn.Module:
    fully_shard(model, mesh=over, **options)
    return model


def tensor_parallel(model: nn.Module, whole: DeviceMesh, data: DeviceMesh | None, *, norms: bool) -> nn.Module:
    distribute(model, whole["tp"], norms=norms)
    return model if data is None else fsdp2(model, data)


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    """DDP that keeps its gradients in its buckets and sends them in bf16."""
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    # by the name of torch's own DDP knows that it is to run on GPUs only
    wrapped.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket))
    return wrapped


def experts(model: nn.Module, placement: Shard) -> nn.Module:
    """Expert parallelism over pairs of ranks, as torchtitan and Transformers build it: the matrices are the experts.

    They are split by expert, and each part, by ``placement`` where that is even, over the ranks that have the same
    experts; the rest over all ranks.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    sparse = mesh(efsdp=2, ep=2)
    for name in ("embedding", "weight"):
        setattr(model, name, nn.Parameter(distributed(getattr(model, name).detach(), sparse["ep"], [Shard(0)])))
    model.tied = model.embedding
    over = {True: FSDPMeshInfo(sparse["efsdp"], 0), False: FSDPMeshInfo(mesh(fsdp=4), 0)}

    def place(param: nn.Parameter) -> ShardPlacementResult:
        even = isinstance(param, DTensor) and param.shape[-1] % 2 == 0
        return ShardPlacementResult(placement if even else Shard(0), over[isinstance(param, DTensor)])

    return fsdp2(model, over[False].mesh, shard_placement_fn=place)


def fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    frozen = [p for p in model.parameters() if not p.requires_grad]  # a FlatParameter takes no mixture
    return FullyShardedDataParallel(model, device_id=CPU, ignored_states=frozen, **options)


def pipeline(model: nn.Module, ranks: int = 4) -> nn.Module:
    """Each rank keeps its parts of four, one or two, and names their parameters as the whole model does."""
    parts = [("embedding", "tied"), ("weight",), ("norm", "one"), ("bias", "frozen")]
    keep = [name for part in parts[dist.get_rank() :: ranks] for name in part]
    for name in list(dict(model.named_parameters(remove_duplicate=False))):
        if name not in keep:
            delattr(model, name)
    return model


def named_by_hand(model: nn.Module) -> nn.Module:
    """Plain slices of every parameter, of unequal length, as a home-made sharding would have them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, param in list(model.named_parameters()):
        start, stop = (param.numel() * r * r // world**2 for r in (rank, rank + 1))
        part = nn.Parameter(param.detach().reshape(-1)[start:stop].clone(), requires_grad=param.requires_grad)
        part.slice_of_whole = slice(start, stop)  # type: ignore[attr-defined]
        setattr(model, name, part)
    model.tied = model.embedding
    return model


def world_group() -> dict[str, Any]:
    return {"process_group": dist.group.WORLD}


def none() -> dict[str, Any]:
    return {}


Sharding = tuple[int, Callable[[nn.Module], nn.Module], Callable[[], dict[str, Any]]]
REGIMES: dict[str, Sharding] = {
    "plain": (1, lambda m: m, none),
    "ddp": (4, nn.parallel.DistributedDataParallel, none),
    "fsdp2": (4, lambda m: fsdp2(m, mesh(dp=4)), none),
    "fsdp2-columns": (4, lambda m: fsdp2(m, mesh(dp=4), shard_placement_fn=lambda p: Shard(p.ndim - 1)
                                         if p.shape[-1] % 4 == 0 else Shard(0)), none),
    "fsdp2-cpu-offload": (4, lambda m: fsdp2(m, mesh(dp=4), offload_policy=CPUOffloadPolicy(pin_memory=False)), none),
    "fsdp2-mixed-precision": (4, lambda m: fsdp2(m, mesh(dp=4), mp_policy=MixedPrecisionPolicy(
        torch.bfloat16, torch.float32)), none),
    "hsdp": (4, lambda m: fsdp2(m, mesh(replicate=2, shard=2)), none),
    "tp": (4, lambda m: tensor_parallel(m, mesh(tp=4), None, norms=False), none),
    "tp-norms-dtensor": (4, lambda m: tensor_parallel(m, mesh(tp=4), None, norms=True), none),
    "tp2-fsdp2": (4, lambda m: tensor_parallel(m, whole := mesh(dp=2, tp=2), whole["dp"], norms=False), none),
    "tp2-fsdp2-norms-dtensor": (4, lambda m: tensor_parallel(m, whole := mesh(dp=2, tp=2), whole["dp"], norms=True),
                                none),
    "hsdp-tp": (8, lambda m: tensor_parallel(m, whole := mesh(replicate=2, shard=2, tp=2),
                                             whole["replicate", "shard"], norms=False), none),
    "fsdp1-original": (4, lambda m: fsdp1(m, use_orig_params=True), world_group),
    "fsdp1-flat": (4, lambda m: fsdp1(m, use_orig_params=False), world_group),
    "fsdp1-flat-hybrid": (4, lambda m: fsdp1(m, use_orig_params=False, device_mesh=mesh(replicate=2, shard=2),
                                             sharding_strategy=ShardingStrategy.HYBRID_SHARD), world_group),
    "fsdp1-not-sharded": (4, lambda m: fsdp1(m, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD),
                          lambda: {"sharding": "replicated"}),
    "pipeline": (4, pipeline, world_group),
    "by-hand": (4, named_by_hand, lambda: {"sharding": "sharded"}),
}  # fmt: skip
FURTHER: dict[str, Sharding] = {
    "ddp, bf16 hook": (2, ddp, none),
    "ddp, static graph": (2, lambda m: ddp(m, static_graph=True), none),
    "fsdp2, ignored": (4, lambda m: fsdp2(m, mesh(dp=4), ignored_params={m.weight, m.bias}), none),
    "fsdp2, context": (4, lambda m: fsdp2(m, mesh(dp=2, cp=2)["dp", "cp"]._flatten("dp_cp")), none),
    "fsdp2, experts": (4, lambda m: experts(m, Shard(0)), none),
    "fsdp2, experts by columns": (4, lambda m: experts(m, Shard(1)), none),
    "pipeline, two parts a rank": (2, lambda m: pipeline(m, 2), world_group),
}
"""What is built from the same: fewer settings tell."""

NORMS = ("grad_norm", "update_norm")

REPLICATED = ("plain", "ddp", *(name for name in FURTHER if name.startswith("ddp")), "fsdp1-not-sharded")


def give(model: nn.Module, gradients: dict[str, Tensor | None]) -> None:
    """Every trainable parameter its (part of a) gradient; by a backward where only that knows the parts."""
    by_backward = FullyShardedDataParallel, nn.parallel.DistributedDataParallel
    if isinstance(model, by_backward) or (isinstance(model, FSDPModule) and mixed_precision(model)):
        model(gradients).backward()
        return
    for name, param in model.named_parameters():
        if param.requires_grad:
            whole = gradients[name]
            param.grad = None if whole is None else pieces.local_part(whole.to(param.dtype), param)


def mixed_precision(model: FSDPModule) -> bool:
    return model._get_fsdp_state()._mp_policy.param_dtype is not None


def observe(optimizer: AlphaOptimizer) -> tuple[Any, dict[str, float]]:
    return optimizer.alpha, optimizer.agreement


def run(
    regime: str,
    options: dict[str, Any],
    steps: int = 10,
    seed: int = 1,
    kind: type[AlphaOptimizer] = AlphaAdam,
    dtype: torch.dtype = torch.float32,
    groups: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """On a rank: steps with given gradients; alphas, counts, collectives and what the rank then holds.

    ``dtype`` is the parameters', ``groups`` are entries for parameter_groups. Moments are told of where they are kept
    by parameter. With telemetry ``norms`` are what metrics() has of each step.
    """
    _, shard, extra = (REGIMES | FURTHER)[regime]
    model = shard(Given().to(dtype))
    params: Any = model.named_parameters() if groups is None else parameter_groups(model, groups, kind)
    optimizer = kind(params, **{"lr": LR, "weight_decay": 0.1, **options, **extra()})
    seen, collectives, norms = [], [], []
    for gradients in given_gradients(steps, seed):
        give(model, gradients)
        with threads.Collectives() as counted:
            optimizer.step()
        optimizer.zero_grad()
        collectives.append(counted.seen)
        seen.append(observe(optimizer))
        norms += [[optimizer.metrics()[name] for name in NORMS]] if options.get("telemetry") else []
    held = {"params": pieces.of_model(model, SHAPES)}
    if not isinstance(model, FullyShardedDataParallel):
        named = [(n, p) for n, p in pieces.clean(model) if p.requires_grad]
        for name in kind.moments:
            held[name] = pieces.pieces(named, SHAPES, {p: optimizer.state[p][name] for _, p in named})
    return {"seen": seen, "collectives": collectives, "norms": norms, **held}
