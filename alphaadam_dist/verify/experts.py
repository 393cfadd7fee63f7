"""The Llama with Mixtral's feed-forwards, and how torch puts their experts on pairs of ranks."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

from .model import Llama

EXPERTS, CHOSEN = 4, 2


class Experts(nn.Module):
    """Feed-forwards in two stacks of weights, by expert. A rank of expert parallelism has its share of them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * inner, width, device="cpu"))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, width, inner, device="cpu"))
        self.act_fn, self.num_experts = nn.SiLU(), EXPERTS  # AutoEP asks for them

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """The sum of what the experts make of ``tokens`` (count, width), by ``weights`` (count, experts that are held).

        A weight of 0 is an expert that was not chosen.
        """
        out = torch.zeros_like(tokens)
        for mine, gate_up, down in zip(weights.T, local(self.gate_up_proj), local(self.down_proj), strict=True):
            rows = mine.nonzero().squeeze(-1)
            gate, up = (tokens[rows] @ gate_up.T).chunk(2, -1)
            out = out.index_add(0, rows, mine[rows, None] * (F.silu(gate) * up @ down.T))
        return out


class Mixture(nn.Module):
    """Each token goes to the experts that the router weighs most. Together they are as large as one FeedForward."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = Experts(width, inner // EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        best, chosen = self.gate(tokens).softmax(-1).topk(CHOSEN)
        weights = torch.zeros(len(tokens), EXPERTS, dtype=x.dtype, device=x.device)
        weights = weights.scatter(1, chosen, best / best.sum(-1, keepdim=True))
        return self.experts(tokens, weights).view_as(x)


def mixtral(width: int) -> Llama:
    """The Llama with a Mixture in each layer, which DeepSpeed's AutoEP takes for Mixtral."""
    model = Llama(width=width, feed_forward=Mixture)
    config: Any = SimpleNamespace(model_type="mixtral", num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    model.config = config
    return model


def local(param: Tensor) -> Tensor:
    return param.to_local() if isinstance(param, DTensor) else param


def shard_experts(model: Llama, device: torch.device) -> None:
    """Split the experts over pairs of ranks, and each part with FSDP2 over the ranks that have the same experts."""
    shape = dist.get_world_size() // 2, 2
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("same_experts", "experts"))
    for layer in model.layers:
        experts = layer.get_submodule("feed_forward.experts")
        distribute_module(experts, mesh["experts"], _split, _to_pair, _from_pair)
        fully_shard(experts, mesh=mesh["same_experts"])


def _split(name: str, experts: nn.Module, pair: DeviceMesh) -> None:
    for own, param in list(experts.named_parameters(recurse=False)):
        experts.register_parameter(own, nn.Parameter(distribute_tensor(param.detach(), pair, [Shard(0)])))


def _to_pair(experts: nn.Module, inputs: tuple[Tensor, Tensor], pair: DeviceMesh) -> Any:  # torch says None
    """Both ranks have all tokens. In the backward each adds the other's share of their gradient."""
    tokens, weights = (DTensor.from_local(each, pair, [Replicate()]) for each in inputs)
    return tokens.to_local(grad_placements=[Partial()]), weights.redistribute(placements=[Shard(1)]).to_local()


def _from_pair(experts: nn.Module, outputs: Tensor, pair: DeviceMesh) -> Any:
    """The sum over the pair, whose gradient each rank has whole."""
    return DTensor.from_local(outputs, pair, [Partial()]).redistribute(placements=[Replicate()]).to_local()
