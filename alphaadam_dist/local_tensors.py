"""What this rank holds of a parameter group, as the kernels take it: lists of local tensors, one for each segment.

DTensors are unwrapped here, once a step: an operation on a DTensor costs ten times one on its local tensor. A list is
of one device: where a model lies on several, there are lists for each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, Segment
from .shards import cut
from .tensors import is_dtensor, local

Owned = tuple[Segment, Tensor, Tensor]
"""A segment that this rank counts, its gradient and its momentum."""


@dataclass(frozen=True)
class LocalTensors:
    """The segments of the parameters that have a gradient, one or more. ``moments`` is a list for each state tensor."""

    segments: tuple[Segment, ...]
    params: list[Tensor]
    grads: list[Tensor]
    moments: list[list[Tensor]]
    states: list[dict[str, Any]]

    def advance_steps(self, capturable: bool) -> list[float] | Tensor:
        """Count an update of every parameter; t of each segment, on its device if ``capturable``."""
        own = list({id(state): state for state in self.states}.values())
        if capturable:
            torch._foreach_add_([state["step"] for state in own], 1.0)
            counted = zip(self.states, self.segments, strict=True)
            return torch.stack([s["step"] - segment.late if segment.late else s["step"] for s, segment in counted])
        # new tensors: checkpoints may have made parameters share one
        for state, step in zip(own, torch._foreach_add([state["step"] for state in own], 1.0), strict=True):
            state["step"] = step
        return [state["step"].item() - segment.late for state, segment in zip(self.states, self.segments, strict=True)]

    def owned(self) -> list[Owned]:
        """What this rank counts of it."""
        held = zip(self.segments, self.grads, self.moments[0], strict=True)
        return [(segment, grad, momentum) for segment, grad, momentum in held if segment.owned]


def local_tensors(
    params: Sequence[Tensor], layout: Layout, moments: Sequence[str], state_of: Callable[[Tensor], dict[str, Any]]
) -> list[LocalTensors]:
    """The local tensors of these parameters that have a gradient, cut into their segments, for each device.

    Raises ValueError where a gradient is sparse.
    """
    on_device: dict[torch.device | None, list[Tensor]] = {}
    for param in params if layout.several_devices else ():
        on_device.setdefault(param.device, []).append(param)
    held = [_of_one_device(some, layout, moments, state_of) for some in on_device.values() or [params]]
    return [part for part in held if part is not None]


def _of_one_device(
    params: Sequence[Tensor], layout: Layout, moments: Sequence[str], state_of: Callable[[Tensor], dict[str, Any]]
) -> LocalTensors | None:
    segments: list[Segment] = []
    states: list[dict[str, Any]] = []
    lists: list[list[Tensor]] = [[] for _ in range(2 + len(moments))]
    for param in params:
        grad = gradient(param)
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise ValueError(f"sparse gradients ({grad.layout}) are not taken: build the embedding with sparse=False")
        state = state_of(param)
        tensors = [local(param), grad, *[local(state[name]) for name in moments]]
        for segment in layout.segments[param]:
            segments.append(segment)
            states.append(state)
            for into, tensor in zip(lists, tensors, strict=True):
                into.append(tensor if segment.whole else tensor.view(-1)[segment.start : segment.start + segment.numel])
    return LocalTensors(tuple(segments), lists[0], lists[1], lists[2:], states) if segments else None


def gradient(param: Tensor) -> Tensor | None:
    """The local gradient; None where there is none."""
    grad = param.grad
    if grad is None or type(grad) is Tensor:
        return grad
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
        # as AdamW's operations would; kept, because the update reads what was counted
        param.grad = grad = grad.redistribute(placements=param.placements)
    return local(grad)


def owned_of_flat(segments: Sequence[Segment], pieces: Sequence[Tensor], momentum: Tensor) -> list[Owned]:
    """What this rank counts of a flat gradient that is given in pieces."""
    if len(pieces) == 1 and len(segments) == 1 and segments[0].whole:
        grad = pieces[0]
        return [(segments[0], grad, momentum.view(grad.shape))] if segments[0].owned else []
    flat = momentum.view(-1)
    runs = [(segment.start, segment.numel, segment) for segment in segments if segment.owned]
    return [(segment, grad, flat[start : start + grad.numel()]) for segment, start, grad in cut(pieces, runs)]


def by_device(owned: Sequence[Owned], layout: Layout) -> list[tuple[tuple[Segment, ...], list[Tensor], list[Tensor]]]:
    """Slots, gradients and momenta on each device that has any."""
    parts: dict[torch.device | None, list[Owned]] = {}
    for one in owned if layout.several_devices else ():
        parts.setdefault(one[2].device, []).append(one)
    return [
        (tuple(segment for segment, _, _ in part), [grad for _, grad, _ in part], [momentum for _, _, momentum in part])
        for part in parts.values() or [owned]
        if part
    ]
