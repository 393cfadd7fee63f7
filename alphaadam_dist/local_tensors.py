"""What this rank holds of a parameter group, as the kernels take it: lists of local tensors, one for each segment.

DTensors are unwrapped here, once a step: an operation on a DTensor costs ten times one on its local tensor. A list is
of one device: where a model lies on several, there are lists for each. Nothing is kept from step to step but which
segments a list has: gradients are new in each, and states may have been moved or replaced in between.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .layout import Cut, Layout, Segment
from .shards import cut as cut_runs
from .tensors import is_dtensor, local

Owned = tuple[Segment, Tensor, Tensor]
"""A segment that this rank counts, its gradient and its momentum."""


@dataclass(frozen=True)
class LocalTensors:
    """The segments of the parameters that have a gradient, one or more.

    Attributes:
        cut: how the parameters are cut into segments.
        params, grads: a tensor for each segment.
        moments: such a list for each state tensor.
        states: of the parameters.
    """

    cut: Cut
    params: list[Tensor]
    grads: list[Tensor]
    moments: list[list[Tensor]]
    states: list[dict[str, Any]]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """In the order of the lists."""
        return self.cut.segments

    def advance_steps(self, kernels: ModuleType, own: dict[int, Tensor], *, capturable: bool) -> list[float] | Tensor:
        """Count an update of every parameter in place; t of each segment, on its device if ``capturable``.

        ``own`` has the steps that were counted before, by id of the parameter. Others are copied first: checkpoints
        make parameters share one, which would count for all of them.
        """
        pairs = zip(self.segments, self.cut.of, strict=True)
        if capturable:
            steps = [state["step"] for state in self.states]
            torch._foreach_add_(steps, 1.0)
            return torch.stack([steps[i] - segment.late if segment.late else steps[i] for segment, i in pairs])
        steps = []
        for param, state in zip(self.cut.params, self.states, strict=True):
            step = state["step"]
            if own.get(id(param)) is not step:
                state["step"] = own[id(param)] = step = step.clone()
            steps.append(step)
        counted: list[float] = kernels.advance(steps)
        return [counted[i] - segment.late for segment, i in pairs]

    def owned(self) -> list[Owned]:
        """What this rank counts of it."""
        held = zip(self.segments, self.grads, self.moments[0], strict=True)
        return [(segment, grad, momentum) for segment, grad, momentum in held if segment.owned]


def local_tensors(
    params: Sequence[Tensor],
    layout: Layout,
    states: Mapping[Tensor, dict[str, Any]],
    moments: Sequence[str],
    make_state: Callable[[Tensor], None],
) -> list[LocalTensors]:
    """The local tensors of these parameters that have a gradient, cut into their segments, for each device.

    Args:
        states: of the parameters; where a moment is missing ``make_state`` makes it.

    Raises ValueError where a gradient is sparse.
    """
    on_device: dict[torch.device | None, list[Tensor]] = {}
    for param in params if layout.several_devices else ():
        on_device.setdefault(param.device, []).append(param)
    held = [_of_one_device(some, layout, states, moments, make_state) for some in on_device.values() or [params]]
    return [part for part in held if part is not None]


def _of_one_device(
    params: Sequence[Tensor],
    layout: Layout,
    states: Mapping[Tensor, dict[str, Any]],
    moments: Sequence[str],
    make_state: Callable[[Tensor], None],
) -> LocalTensors | None:
    having: list[Tensor] = []
    grads: list[Tensor] = []
    for param in params:
        grad = gradient(param)
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise ValueError(f"sparse gradients ({grad.layout}) are not taken: build the embedding with sparse=False")
        having.append(param)
        grads.append(grad)
    if not having:
        return None
    own = [states[param] for param in having]
    for param, state in zip(having, own, strict=True):
        if moments[0] not in state:  # DeepSpeed leaves empty dicts behind, trainers keys of their own
            make_state(param)
    cut = layout.cut_of(having)
    held = [[local(param) for param in having], *([local(state[name]) for state in own] for name in moments)]
    of_params, *of_moments = [_segments(cut, tensors) for tensors in held]
    return LocalTensors(cut, of_params, _segments(cut, grads), of_moments, own)


def _segments(cut: Cut, tensors: list[Tensor]) -> list[Tensor]:
    """The segments of whole local tensors, one a parameter: views, for what is written must arrive in them."""
    if cut.whole:
        return tensors
    pairs = zip(cut.segments, cut.of, strict=True)
    return [tensors[i] if s.whole else tensors[i].view(-1)[s.start : s.start + s.numel] for s, i in pairs]


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
    return [(segment, grad, flat[start : start + grad.numel()]) for segment, start, grad in cut_runs(pieces, runs)]


Counted = tuple[tuple[Segment, ...], list[Tensor], list[Tensor]]
"""Segments of one device, with their gradients and momenta."""


def counted(held: Sequence[LocalTensors], layout: Layout) -> list[Counted]:
    """What this rank counts of it, on each device that has any."""
    if len(held) == 1 and held[0].cut.owned:  # the lists that the update takes too
        return [(held[0].segments, held[0].grads, held[0].moments[0])]
    return by_device([one for part in held for one in part.owned()], layout)


def by_device(owned: Sequence[Owned], layout: Layout) -> list[Counted]:
    """The same of what is given one by one."""
    parts: dict[torch.device | None, list[Owned]] = {}
    for one in owned if layout.several_devices else ():
        parts.setdefault(one[2].device, []).append(one)
    return [
        (tuple(segment for segment, _, _ in part), [grad for _, grad, _ in part], [momentum for _, _, momentum in part])
        for part in parts.values() or [owned]
        if part
    ]
