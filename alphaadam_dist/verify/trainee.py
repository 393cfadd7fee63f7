"""What ``alphaadam verify`` trains: a module, an engine or a pipeline, all driven alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .model import next_token_loss


@dataclass(frozen=True)
class Trainee:
    """A model in training.

    Attributes:
        backward: of the next-token loss of a batch, times a factor.
        step: of the optimizer, with whatever of the backward is left.
        full_parameters: the whole parameters by their names in the bare model, copied to the CPU. Collective.
    """

    optimizer: Optimizer
    backward: Callable[[Tensor, float], None]
    step: Callable[[], Any]
    full_parameters: Callable[[], Iterable[tuple[str, Tensor]]]


def of_module(
    model: nn.Module, optimizer: Optimizer, full_parameters: Callable[[Any], Iterable[tuple[str, Tensor]]]
) -> Trainee:
    def backward(batch: Tensor, scale: float) -> None:
        optimizer.zero_grad()
        (scale * next_token_loss(model(batch), batch)).backward()

    return Trainee(optimizer, backward, optimizer.step, lambda: full_parameters(model))


def of_engine(
    engine: Any, optimizer: Optimizer, full_parameters: Callable[[Any], Iterable[tuple[str, Tensor]]]
) -> Trainee:
    """``engine`` is DeepSpeed's, which steps its optimizer itself and forgets the gradients."""

    def backward(batch: Tensor, scale: float) -> None:
        engine.backward(scale * next_token_loss(engine(batch), batch))

    return Trainee(optimizer, backward, engine.step, lambda: full_parameters(engine))


def of_all_ranks(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each rank holds of the parameters, and the other ranks. Collective."""
    everywhere: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, held)
    return {name: param for each in everywhere for name, param in each.items()}
