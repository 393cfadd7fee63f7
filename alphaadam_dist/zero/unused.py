"""Parameters without a gradient in a step: not counted, not stepped, not decayed, as in one process.

DeepSpeed steps flats as wholes. What stands there for a parameter that no backward reached since the last step is
zeros, or, at stage 3 and with offload, its gradient of an earlier step. So every gradient is noted as DeepSpeed takes
it into its reduction, which is the same on all ranks; the parameters of which none came are zeroed in DeepSpeed's
buffers, and the layout of that step has no runs of theirs.

A flat has one count of its updates, which goes on in every step. A parameter's own is less by the steps that it missed;
those stand in the parameter groups under ``MISSED``, and so in checkpoints.
"""

import dataclasses
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import Any

from torch import Tensor

from ..layout import Layout, Segment
from ..optimizer import AlphaOptimizer
from ..shards import Shard
from .internals import AtOnce, InParts, Replicated

MISSED = "alphaadam_missed"
"""Key of parameter groups: name -> steps missed, of the parameters that missed any; the same in all groups."""


class Unused:
    """Which parameters have no gradient in the step to come, and the layout without them."""

    def __init__(
        self, optimizer: AlphaOptimizer, wrapper: InParts, layout: Layout, shards: Sequence[Sequence[Shard]],
        names: Mapping[Tensor, str],
    ) -> None:  # fmt: skip
        self._optimizer, self._wrapper, self.layout = optimizer, wrapper, layout
        self._flats, self._shards = wrapper.flats(), shards
        self._names = names
        self._params = {names[param]: param for param in wrapper.parameters()}
        self._used: set[str] = set()  # since the last step
        self._landed: set[str] = set()  # in the last micro-batch
        self._zeroed: set[str] = set()  # their gradients in DeepSpeed's buffers are zero, and nobody writes there
        self._absent: frozenset[str] = frozenset()
        self._cached: tuple[Any, Layout] = (None, layout)  # the layout for (absent, late)
        wrapper.watch_gradients(self._note)

    def _note(self, param: Tensor, first: bool, last: bool) -> None:
        """DeepSpeed is about to reduce a gradient of this parameter, in the first or last micro-batch of a step."""
        key = self._names[param]
        if key not in self._used and key not in self._zeroed and not first:
            self._drop_stale(param)  # or this gradient would be added to it
        self._used.add(key)
        self._zeroed.discard(key)
        if last:
            self._landed.add(key)

    def open(self) -> Layout:
        """The layout of the step that begins: without the parameters that have no gradient."""
        if self._wrapper.lands and self._used > self._landed:
            self._wrapper.land([self._params[key] for key in self._used - self._landed])
        self._absent = frozenset(self._params.keys() - self._used)
        self._used.clear()
        self._landed.clear()
        if self._absent - self._zeroed:
            self._zero(self._absent - self._zeroed)
        missed = self._missed()
        late = {key: missed[key] for key in missed.keys() & self._params.keys() - self._absent}
        if not self._absent and not late:
            return self.layout
        if self._cached[0] != (self._absent, late):
            self._cached = (self._absent, late), _without(self.layout, self._flats, self._shards, self._absent, late)
        return self._cached[1]

    def applied(self) -> None:
        """The step has been applied."""
        if self._absent and self._optimizer.counts_steps:
            missed = self._missed()  # a new dict: a state_dict in the user's hands may have the old one
            missed |= {key: missed.get(key, 0) + 1 for key in self._absent}
            for group in self._optimizer.param_groups:
                group[MISSED] = missed

    def _missed(self) -> dict[str, int]:
        return dict(self._optimizer.param_groups[0].get(MISSED, {}))

    def _zero(self, keys: Set[str]) -> None:
        for key in keys:
            self._drop_stale(self._params[key])
        for flat, held in zip(self._flats, self._shards, strict=True):
            if flat.grad is not None:  # offloaded: it stays from step to step
                for shard in held:
                    if shard.key in keys:
                        flat.grad[shard.start : shard.start + shard.numel].zero_()
        self._zeroed |= keys

    def _drop_stale(self, param: Tensor) -> None:
        stale = self._wrapper.stale(param)
        if stale is not None:
            stale.zero_()


def check_missed(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError where the missed steps in a saved state are none."""
    for i, group in enumerate(state_dict["param_groups"]):
        missed = group.get(MISSED, {})
        whole = isinstance(missed, Mapping) and all(type(steps) is int and steps >= 0 for steps in missed.values())
        if not whole:
            raise ValueError(
                f"{MISSED}={missed!r} in parameter group {i} of the checkpoint: it must be the number of missed steps "
                "by the name of the parameter, as it was saved. Load another checkpoint, or remove it from all groups: "
                "then all parameters go on with the number of updates of those that missed none"
            )


def _without(
    layout: Layout,
    flats: Sequence[Tensor],
    shards: Sequence[Sequence[Shard]],
    absent: Set[str],
    late: Mapping[str, int],
) -> Layout:
    """The layout without the runs of some parameters, the others' with how many updates they are behind their flat."""
    segments = dict(layout.segments)
    for flat, held in zip(flats, shards, strict=True):
        starts = [shard.start for shard in held]
        kept: list[Segment] = []
        for segment in layout.segments[flat]:
            first, last = bisect_left(starts, segment.start), bisect_left(starts, segment.start + segment.numel)
            kept += _runs(segment, held[first:last], absent, late)
        # a flat of which nothing is left is stepped as well, with no elements, so that its count goes on
        segments[flat] = tuple(kept) or (Segment(0, 0, 0, owned=False, whole=False),)
    return dataclasses.replace(layout, segments=segments)


def _runs(segment: Segment, shards: Sequence[Shard], absent: Set[str], late: Mapping[str, int]) -> Iterator[Segment]:
    """What is stepped of a segment that covers these shards, in runs of equal lateness.

    Padding goes with the shard before it.
    """
    labels = [None if shard.key in absent else late.get(shard.key, 0) for shard in shards] or [0]
    starts = [segment.start, *(shard.start for shard in shards[1:])]
    runs = [(next(run), label) for label, run in groupby(range(len(labels)), labels.__getitem__)]
    ends = [starts[first] for first, _ in runs[1:]] + [segment.start + segment.numel]
    for (first, label), end in zip(runs, ends, strict=True):
        if label is not None:
            numel = end - starts[first]
            whole = segment.whole and numel == segment.numel
            yield dataclasses.replace(segment, start=starts[first], numel=numel, whole=whole, late=label)


def watch_zero_filled(engine: Any, optimizer: AlphaOptimizer, wrapper: AtOnce, names: Mapping[Tensor, str]) -> None:
    """Where DeepSpeed takes zeros for a missing gradient, leave the parameter out if this rank is alone, else say so.

    That is at stage 0, and at stage 1 with bf16 parameters and fp32 sums. There a parameter may be used on some ranks
    only, and one rank cannot tell.
    """
    alone = wrapper if isinstance(wrapper, Replicated) and wrapper.alone else None
    absent: list[Tensor] = []
    warned = False

    def note(params: list[Tensor]) -> None:
        nonlocal warned
        absent[:] = params
        if params and alone is None and not warned:
            warned = True
            warnings.warn(
                f"{names.get(params[0], 'a parameter')} and {len(params) - 1} more got no gradient on this rank: at "
                f"stage {engine.zero_optimization_stage()} here DeepSpeed takes zeros for that, for every optimizer. "
                "Zeros are no evidence, so alpha is right; but where no rank used these parameters they decay and "
                "follow their momentum, which in one process and at the other stages they do not. Freeze them before "
                "deepspeed.initialize, or use another stage",
                stacklevel=2,
            )

    def leave_out(*_: Any) -> None:
        if alone is not None and absent:
            stepped = alone.stepped()
            for param in absent:
                if param in stepped:
                    stepped[param].grad = None

    wrapper.watch_zero_filled(engine, note)
    optimizer.register_step_pre_hook(leave_out)
