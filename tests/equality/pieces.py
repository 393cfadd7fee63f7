"""What a rank holds of a model, by element: gathered in the test's own process, without a collective of torch's.

torch keeps rank-specific facts of uneven strided shards in a cache of the process, so ``full_tensor`` is not safe on
threads; and a test should not trust what it tests.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from alphaadam_dist.shards import clean_names
from tests.older import distributed

Pieces = dict[str, tuple[Tensor, Tensor]]
"""For every parameter the flat indices of the elements that a rank holds, and their values."""


def local_part(whole: Tensor, param: Tensor) -> Tensor:
    """The part of a whole tensor that belongs where this rank has its part of a parameter."""
    if isinstance(param, DTensor):
        return distributed(whole, param.device_mesh, param.placements)
    if hasattr(param, "slice_of_whole"):  # a plain tensor of which a test said which part it is
        return whole.reshape(-1)[param.slice_of_whole].clone()
    return whole.clone()


def local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pieces(named: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], values: dict[Tensor, Tensor]) -> Pieces:
    """Of every named parameter the indices it holds and its entry of ``values``, a tensor sharded as it is."""
    held = {}
    for name, param in named:
        indices = torch.arange(shapes[name].numel()).view(shapes[name])
        part = local(local_part(indices, param)).reshape(-1)
        held[name] = part, local(values[param]).detach().reshape(-1).clone()
    return held


def of_model(model: nn.Module, shapes: dict[str, torch.Size]) -> Pieces:
    """The parameters of a model on this rank."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {n: (torch.arange(p.numel()), p.detach().clone().reshape(-1)) for n, p in clean(model)}
    named = clean(model)
    return pieces(named, shapes, {p: p for _, p in named})


def clean(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by their names in the bare model."""
    named = list(model.named_parameters())
    names = clean_names(name for name, _ in named)
    return [(names[name], param) for name, param in named]


def assemble(ranks: list[Pieces], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Whole parameters. Every element must be held somewhere, with the same bits everywhere."""
    whole = {}
    for name, shape in shapes.items():
        held = [rank[name] for rank in ranks if name in rank]
        flat = torch.full((shape.numel(),), float("nan"), dtype=held[0][1].dtype)
        for indices, values in held:
            flat[indices] = values
        for indices, values in held:
            assert torch.equal(flat[indices], values), f"replicas of {name} differ"
        assert not flat.isnan().any(), f"some element of {name} is held nowhere, or NaN"
        whole[name] = flat.view(shape)
    return whole


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: param.shape for name, param in model.named_parameters()}


def rank_in_world() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
