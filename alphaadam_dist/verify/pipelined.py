"""The Llama in torch's pipeline: two ranks, each with two of four parts that do not follow each other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B
from torch.optim import Optimizer

from .model import Llama, next_token_loss
from .trainee import Trainee, of_all_ranks

RANKS = 2
PARTS = (("embedding",), ("layers.0",), ("layers.1",), ("norm", "head"))


def keep_parts(model: Llama, device: torch.device) -> Llama:
    """This rank's parts, by their names in the whole model. The ranks of other pipelines hold the same."""
    rank = dist.get_rank() % RANKS
    for i, names in enumerate(PARTS):
        for name in names if i % RANKS != rank else ():
            model.set_submodule(name, nn.Identity())
    return model


def trainee(model: nn.Module, optimizer: Optimizer) -> Trainee:
    """Train what ``keep_parts`` left, in as many micro-batches as ranks. Collective."""
    device = next(model.parameters()).device
    shape = dist.get_world_size() // RANKS, RANKS
    group = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "pipeline"))["pipeline"].get_group()
    rank, factor = dist.get_rank(group), 1.0
    stages: list[Any] = []
    for i in range(rank, len(PARTS), RANKS):
        part = nn.Sequential(*(model.get_submodule(name) for name in PARTS[i]))
        stages.append(PipelineStage(part, i, len(PARTS), device, group=group))

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return factor * next_token_loss(logits, tokens)

    schedule = ScheduleInterleaved1F1B(stages, RANKS, loss_fn=loss)

    def backward(batch: Tensor, scale: float) -> None:
        nonlocal factor
        factor = scale
        optimizer.zero_grad()
        schedule.step(*([batch] if rank == 0 else []), target=batch if rank == RANKS - 1 else None)

    def full_parameters() -> list[tuple[str, Tensor]]:
        held = {name: param.detach().cpu().clone() for name, param in model.named_parameters()}
        return list(of_all_ranks(held).items())

    return Trainee(optimizer, backward, optimizer.step, full_parameters)
