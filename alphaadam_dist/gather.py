"""What this rank holds of a parameter group, as the kernels take it: lists of local tensors, one entry for each slot.

DTensors are unwrapped here, once a step: an operation on a DTensor costs ten times one on its local tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from .ownership import Slot
from .shards import cut


@dataclass(frozen=True)
class Gathered:
    """The slots of the parameters that have a gradient. ``moments`` is a list for each state tensor by name."""

    slots: tuple[Slot, ...]
    params: list[Tensor]
    grads: list[Tensor]
    moments: list[list[Tensor]]
    states: list[dict[str, Any]]

    def advance_steps(self, capturable: bool) -> list[float] | Tensor:
        """Count an update of every parameter; t of each slot, on its device if ``capturable``."""
        own = list({id(state): state for state in self.states}.values())
        if not own:
            return []
        if capturable:
            torch._foreach_add_([state["step"] for state in own], 1.0)
            counted = zip(self.states, self.slots, strict=True)
            return torch.stack([s["step"] - slot.late if slot.late else s["step"] for s, slot in counted])
        # new tensors: checkpoints may have made parameters share one
        for state, step in zip(own, torch._foreach_add([state["step"] for state in own], 1.0), strict=True):
            state["step"] = step
        return [state["step"].item() - slot.late for state, slot in zip(self.states, self.slots, strict=True)]


def gather(
    params: Sequence[Tensor],
    slots: Mapping[Tensor, tuple[Slot, ...]],
    moments: Sequence[str],
    state_of: Callable[[Tensor], dict[str, Any]],
) -> Gathered:
    """The local tensors of these parameters, cut into their slots; those without a gradient are left out.

    Raises ValueError where a gradient is sparse.
    """
    cut_into: list[Slot] = []
    states: list[dict[str, Any]] = []
    lists: list[list[Tensor]] = [[] for _ in range(2 + len(moments))]
    for param in params:
        grad = gradient(param)
        if grad is None:
            continue
        if grad.is_sparse:
            raise ValueError("sparse gradients are not taken: build the embedding with sparse=False")
        state = state_of(param)
        tensors = [local(param), grad, *[local(state[name]) for name in moments]]
        for slot in slots[param]:
            cut_into.append(slot)
            states.append(state)
            for into, tensor in zip(lists, tensors, strict=True):
                into.append(tensor if slot.whole else tensor.view(-1)[slot.start : slot.start + slot.numel])
    return Gathered(tuple(cut_into), lists[0], lists[1], lists[2:], states)


def gradient(param: Tensor) -> Tensor | None:
    """The local gradient; None where there is none."""
    grad = param.grad
    if grad is None or not isinstance(grad, DTensor):
        return grad
    if isinstance(param, DTensor) and grad.placements != param.placements:
        # as AdamW's operations would; kept, because the update reads what was counted
        param.grad = grad = grad.redistribute(placements=param.placements)
    return local(grad)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, a view of it; a plain tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    # not to_local(), which costs as much host time as the rest of the step where parameters are small
    part: Tensor = tensor._local_tensor
    return part.wait() if isinstance(part, AsyncCollectiveTensor) else part


Owned = tuple[Slot, Tensor, Tensor]
"""A slot that this rank counts, its gradient and its momentum."""


def owned_pieces(slots: Sequence[Slot], pieces: Sequence[Tensor], momentum: Tensor) -> list[Owned]:
    """What this rank counts of a flat gradient that is given in pieces."""
    if len(pieces) == 1 and len(slots) == 1 and slots[0].whole:
        grad = pieces[0]
        return [(slots[0], grad, momentum.view(grad.shape))] if slots[0].owned else []
    flat = momentum.view(-1)
    runs = [(slot.start, slot.numel, slot) for slot in slots if slot.owned]
    return [(slot, grad, flat[start : start + grad.numel()]) for slot, start, grad in cut(pieces, runs)]
