"""One step of the whole model, in acts that whoever shards the model drives.

**Open**: the last step's counts arrive. **Count**: read (g, m) of every local shard; one all-reduce makes the counts
those of the whole model, and alpha follows. **Update**: write the parameters and their moments, all or part by part.
**Close**: the step has been applied. With ``sync="delayed"`` nothing is counted before the update: it counts as it
goes, and its alpha comes from the counts of the step before. With ``gamma=1`` nothing is counted at all.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import consistency, options, parameters, rounding, rule
from .kernels import consensus
from .layout import Layout, Segment
from .local_tensors import Counted, LocalTensors, by_device, counted, local_tensors, owned_of_flat
from .persistence import Persistent
from .rounding import Rounding
from .tensors import is_dtensor, local

_AFTER = {
    True: {"count": ("opened",), "update": ("counted", "updated"), "close": ("updated",)},
    False: {"count": (), "update": ("opened", "updated"), "close": ("updated",)},
}
"""After which acts an act may come, where a step reads all gradients first and where it does not."""
_ORDER = {True: "count() once, update() for each part of the model, close()", False: "update(), close()"}


Gradient = tuple[Tensor, Sequence[Tensor], Tensor | None]
"""A parameter, its gradient as tensors that concatenate to the flattened local tensor, and its momentum before the
update; None where that is in the optimizer's state."""


class Step:
    """A step that is open. An unfinished one leaves no trace in the statistics but for what it has counted.

    Making it opens it, which is collective where ``verify_every`` is due.

    Args:
        optimizer: whose parameters are stepped.
        layout: of the parameters that are stepped now.

    Raises:
        ValueError: a parameter group contradicts an option of the whole optimizer, or rates are scaled twice.
    """

    def __init__(self, optimizer: Persistent, layout: Layout) -> None:
        run = optimizer._run
        self._statistics = optimizer._adopt()
        self._options = run.options
        for i, group in enumerate(optimizer.param_groups):
            options.check_shared(type(optimizer).__name__, self._options, group, f"parameter group {i}")
        parameters.refuse_scaled_rates(optimizer)
        self._optimizer, self._layout = optimizer, layout
        run.layout = layout
        self._statistics.open(layout)
        self._done = "opened"
        self._stepped = False  # a parameter of this rank
        self._held: list[tuple[dict[str, Any], LocalTensors]] | None = None
        every = self._options.verify_every
        if every and (self._statistics.opened - 1) % every == 0:
            consistency.check(optimizer, layout, self._statistics)

    def may(self, act: str) -> bool:
        """Whether "count", "update" or "close" may come now."""
        return self._done in _AFTER[self._options.reads_first][act]

    @torch.no_grad()
    def count(
        self,
        gradients: Iterable[Gradient] | None = None,
        scale: Tensor | float | None = None,
    ) -> None:
        """Count the masks of the whole model, take its norm where an option needs it, reduce both. Collective.

        Where the norm is not finite and ``skip_nonfinite`` says so, the acts that follow do nothing.

        Args:
            gradients: for every optimizer parameter of this rank that has one, scaled by any positive factor if the
                threshold is 0. Each is read before the next is asked for, once: no option that takes the norm may be
                set. None: the parameters' own gradients.
            scale: multiplies the gradients into true ones where the threshold needs that.

        Raises:
            RuntimeError: out of order; or a rank failed.
        """
        self._advance("count", "counted")
        if gradients is None:
            self._held = self._local_tensors()
            lists: Iterable[Counted] = counted([held for _, held in self._held], self._layout)
        else:
            lists = chain.from_iterable(self._counted_of(*one) for one in gradients)
        chosen, wide = self._options, self._options.state_dtype is not None
        if chosen.norm_first:
            for segments, grads, momenta in lists:
                self._statistics.add_norms(segments, self._kernels(grads).squared_norms(grads, momenta, wide=wide))
            self._statistics.reduce_norms()
            scale = scale if chosen.clip_norm is None else self._statistics.clip_coefficient()
        if not chosen.masked or self._statistics.skipping:
            return
        for segments, grads, momenta in lists:
            counts, norms = self._kernels(grads).count(
                grads, momenta, threshold=chosen.threshold, scale=self._directed(scale),
                norms=(chosen.with_norm or chosen.telemetry) and not chosen.norm_first, wide=wide,
            )  # fmt: skip
            if norms is not None:
                self._statistics.add_norms(segments, norms)
            self._statistics.add(segments, counts)
        self._statistics.reduce()

    @torch.no_grad()
    def update(
        self,
        parts: Iterable[tuple[dict[str, Any], Sequence[Tensor]]] | None = None,
        scale: Tensor | float | None = None,
    ) -> None:
        """Step the parameters that have a gradient, each once in a step. Mutates them and their state.

        Args:
            parts: parameter groups, each with those of its parameters that step now. None: all that are in the
                optimizer's groups now.
            scale: multiplies the gradients into true ones; None where they are.

        Raises:
            RuntimeError: out of order.
        """
        self._advance("update", "updated")
        if self._statistics.skipping:
            return
        optimizer, chosen = self._optimizer, self._options
        held, self._held = self._local_tensors(parts) if self._held is None else self._held, None
        self._stepped = self._stepped or bool(held)
        clip = self._statistics.clip_coefficient()
        scale = self._directed(clip if scale is None else scale)
        for group, part in held:
            kernels = self._kernels(part.params)
            counts, squared_norms = kernels.update(
                optimizer.direction,
                part.params,
                part.grads,
                part.moments,
                strengths=self._statistics.strengths(part.segments),
                threshold=chosen.threshold,
                scale=scale,
                counting=chosen.masked and not chosen.reads_first,
                steps=part.advance_steps(kernels, optimizer._run.steps, capturable=chosen.capturable)
                if optimizer.counts_steps
                else None,
                hyperparameters=self._hyperparameters(group),
                rounding=self._rounding(part.segments),
                norms=chosen.telemetry,
            )
            if counts is not None:
                self._statistics.add(part.segments, counts)
            if squared_norms is not None:
                self._statistics.add_update(part.segments, squared_norms)

    def close(self) -> None:
        """The step has been applied to the whole model. Starts the all-reduce of one that did not read first.

        Raises RuntimeError out of order.
        """
        self._advance("close", "closed")
        if self._statistics.skipping:
            return
        counts = self._optimizer._run.count_step(self._optimizer.param_groups)
        self._statistics.close(counts)
        parameters.note_gradients(self._optimizer, self._layout, self._stepped)

    def _counted_of(self, param: Tensor, gradient: Sequence[Tensor], momentum: Tensor | None) -> list[Counted]:
        """What this rank counts of a gradient that was given."""
        if momentum is None:
            self._make_state(param)
            momentum = local(self._optimizer.state[param][self._optimizer.moments[0]])
        return by_device(owned_of_flat(self._layout.segments[param], gradient, momentum), self._layout)

    def _advance(self, act: str, done: str) -> None:
        chosen = self._options
        if not self.may(act):
            raise RuntimeError(
                f"{act}() of a step that is {self._done}: with sync={chosen.sync!r} and gamma={chosen.gamma!r} a step "
                f"is opened, then {_ORDER[chosen.reads_first]}"
            )
        self._done = done

    def _local_tensors(
        self, parts: Iterable[tuple[dict[str, Any], Sequence[Tensor]]] | None = None
    ) -> list[tuple[dict[str, Any], LocalTensors]]:
        """What is held of each of these parts, or of all groups, on each device, beside the group."""
        if parts is None:
            parts = [(group, group["params"]) for group in self._optimizer.param_groups]
        return [
            (group, held)
            for group, params in parts
            for held in local_tensors(
                params, self._layout, self._optimizer.state, self._optimizer.moments, self._make_state
            )
        ]

    def _hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the direction takes of a parameter group, its lr_scale in the lr."""
        values = {name: options.plain(name, group[name]) for name in self._optimizer.hyperparameters}
        if self._optimizer.looks_ahead:
            values["lookahead"] = self._options.lookahead
        return {**values, "lr": rule.scaled(values["lr"], options.plain("lr_scale", group["lr_scale"]))}

    def _directed(self, scale: Tensor | float | None) -> Tensor | float | None:
        """What makes a gradient the true one: ``scale``, negative to maximize; None where it is that already."""
        if not self._options.maximize:
            return scale
        return -1.0 if scale is None else -scale

    def _rounding(self, segments: tuple[Segment, ...]) -> Rounding | None:
        """How these segments are rounded in this step; None where nothing is."""
        if self._options.state_dtype is None:
            return None
        keys = self._layout.keys_of_bits(segments, self._options.rounding_seed)
        return Rounding(self._optimizer._run.n + 1, keys, [segment.positions for segment in segments])

    def _kernels(self, tensors: Sequence[Tensor]) -> ModuleType:
        """Those for the device of these tensors, of which there is one or more."""
        return consensus.choose(self._options, self._layout, tensors[0].device)

    def _make_state(self, param: Tensor) -> None:
        """Make the parameter's state as torch's optimizers make it, where there is none."""
        optimizer = self._optimizer
        state: dict[str, Any] = optimizer.state[param]
        if optimizer.moments[0] in state:
            return
        if optimizer.counts_steps:
            device = param.device if self._options.capturable else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        like = param if is_dtensor(param) else local(param)
        dtype = rounding.STATE_DTYPES.get(self._options.state_dtype or "")
        for name in optimizer.moments:
            state[name] = torch.zeros_like(like, memory_format=torch.preserve_format, dtype=dtype)
