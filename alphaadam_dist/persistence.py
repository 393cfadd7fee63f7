"""The half of an optimizer that keeps: state dicts, checkpoints, copies, pickles, and what wrappers see of it."""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from . import options, saved_state
from .layout import Layout
from .options import FamilyOptions
from .rounding import FORMAT, INITIAL_ROUNDING, STATE_DTYPES
from .shards import fsdp1
from .statistics import INITIAL_STATE, Statistics

if TYPE_CHECKING:
    from .in_backward import StepInBackward


@dataclass
class Driver:
    """A backend that shards the model itself, and knows its layout better than the optimizer's parameters tell.

    Attributes:
        layout: of the whole model.
        grad_norm: that of the backend for the last step, which scales and clips gradients itself; None where it leaves
            that to the optimizer. May read the device: synchronises.
        update_part: what ``step()`` does where the backend calls it for one part of the model after another.
    """

    layout: Layout
    grad_norm: Callable[[], float | None] | None = None
    update_part: Callable[[], None] | None = None


@dataclass
class Run:
    """What an optimizer makes on its way. No checkpoint carries it, and an optimizer has one from first to last.

    Lightning, Fabric and others wrap an optimizer in an object of a subclass of its class, so properties and methods
    run with the wrapper as ``self``. What they made as attributes would stay with the wrapper; all of it lies here.

    Attributes:
        owner: the optimizer itself, whatever object asks.
        options: the constructor's, checked. Users see them in ``defaults`` and may change them there.
        group_left_out: there was a process_group, which a pickle could not hold.
        statistics: None until somebody needs them.
        published: the list that is in param_groups while nobody has replaced it.
        layout: of the last step.
        driver: the backend that shards the model in the optimizer's place.
        in_backward: what steps the parameters in the backward; None where step() does.
        warned: keys of parameter groups that were warned of.
        idle_steps: how many steps have had no gradient on this rank; None once one had, or once that was said.
        n: steps applied to the whole model, from the first whose learning rate is not 0; rounding reads it.
        published_rounding: as ``published``, of n.
        steps: the counts of updates that the state has from this run, by id of the parameter.
    """

    owner: weakref.ref[Persistent]
    options: FamilyOptions
    group_left_out: bool = False
    statistics: Statistics | None = None
    published: list[float] | None = None
    layout: Layout | None = None
    driver: Driver | None = None
    in_backward: StepInBackward | None = None
    warned: set[str] = field(default_factory=set)
    idle_steps: int | None = 0
    n: int = 0
    published_rounding: list[int] | None = None
    steps: dict[int, Tensor] = field(default_factory=dict)

    def count_step(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """A step has been applied. Whether it counts: torch's checkpoints make state by first ones at a rate of 0."""
        counts = self.n > 0 or any(_moves(group["lr"]) for group in groups)
        self.n += counts
        return counts

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        """That of the owner's copy: a run of its own, for the wrapper's copy as well."""
        run: Run = copy.deepcopy(self.owner(), memo)._run  # type: ignore[union-attr]
        return run


def _moves(lr: float | Tensor) -> bool:
    return (isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0  # reading a device would synchronise


class Persistent(Optimizer):
    """What AlphaOptimizer is to those who save, load, copy, wrap and step it."""

    direction: ClassVar[Callable[..., None]]
    """One update of one tensor: ``direction(param, grad, *moments, f, **hyperparameters)``, as in rule.py."""
    moments: ClassVar[tuple[str, ...]]
    """The state tensors of a parameter, each of its shape. The masks compare the gradient with the first."""
    counts_steps: ClassVar[bool] = False
    """Whether the state has ``step``, the number of the parameter's updates, and the direction takes it."""
    looks_ahead: ClassVar[bool] = False
    """Whether the direction takes the option ``lookahead``. Where it does not, any but 0 is refused."""
    hyperparameters: ClassVar[tuple[str, ...]]
    """What each parameter group may have of its own and the direction takes; "lr" and "weight_decay" among them.

    Beside them each group has ``lr_scale``, which multiplies its lr wherever that is used: schedulers write one lr into
    all groups, and this stays.
    """
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Group keys of the torch optimizer whose checkpoints are exchanged, with the one value that is served."""
    _run: Run

    @classmethod
    def group_keys(cls) -> tuple[str, ...]:
        """The values that a parameter group may have of its own, by name."""
        return (*cls.hyperparameters, "lr_scale")

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None: ...

    @property
    def sharding(self) -> str:
        """The option."""
        return self._run.options.sharding

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Over which the model is sharded, None for all ranks. Raises ValueError where a pickle left it out."""
        if self._run.group_left_out:
            raise ValueError(
                f"this {type(self).__name__} had a process_group, which its pickle could not hold: set "
                "optimizer.process_group to the group over which the model is sharded, or to None for all ranks"
            )
        return self._run.options.process_group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._run.options = replace(self._run.options, process_group=group)
        self._run.group_left_out = False

    # ---- state dicts ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer's or of torch's counterpart.

        Raises ValueError where it does not fit; then nothing has changed.
        """
        saved_state.check_kind(state_dict)
        # the last of the hooks, which may make a state fit
        check = self.register_load_state_dict_pre_hook(lambda _, state_dict: self._check_saved_parameters(state_dict))
        try:
            super().load_state_dict(state_dict)
        finally:
            check.remove()

    def _check_saved(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError where a saved state is not one of this optimizer's with equally many parameter groups."""
        kind = type(self).__name__
        saved_state.check_kind(state_dict)
        saved_state.check_names(kind, state_dict, self.moments, self.fixed)
        saved_state.check_groups(
            kind, state_dict, self.param_groups, self.defaults, self.hyperparameters, self._check_group
        )

    def _check_saved_parameters(self, state_dict: Mapping[str, Any]) -> None:
        self._check_saved(state_dict)
        saved_state.check_states(
            self.param_groups,
            state_dict,
            self.moments,
            counts_steps=self.counts_steps,
            swapped=self._run.driver is not None and self._run.driver.update_part is not None,
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict with ``alphaadam_state = [T, alpha, A, C]`` in every group. Synchronises.

        ``alphaadam_rounding = [format, n]`` stands beside it.
        """
        self._publish()
        state_dict = super().state_dict()
        for group in state_dict.get("param_groups", ()):  # a scheduler may have written numpy's numbers into them
            group.update((name, options.plain(name, group[name])) for name in self.group_keys())
        return state_dict

    def _adopt(self) -> Statistics:
        """The statistics, after taking over what somebody put into the defaults and the parameter groups."""
        changed = {name: self.defaults[name] for name in options.IN_GROUPS}
        if changed != self._run.options.in_groups():
            options.refuse_lookahead(type(self).__name__, changed, looks_ahead=self.looks_ahead)
            self._run.options = replace(self._run.options, **changed)
        if self._run.statistics is None:
            self._run.statistics = Statistics(self._run.options)
        self._run.statistics.options = self._run.options
        held = self.param_groups[0].get("alphaadam_state", INITIAL_STATE)
        if held is not self._run.published:
            values = saved_state.statistics(held)
            self._run.statistics.load(values)
            self._put(values)
        held = self.param_groups[0].get("alphaadam_rounding", INITIAL_ROUNDING)
        if held is not self._run.published_rounding:
            self._run.n = saved_state.steps_of(held)
            self._put_rounding()
        return self._run.statistics

    def _publish(self) -> None:
        """Write the statistics of the device into every parameter group."""
        self._put(self._adopt().state())
        self._put_rounding()

    def _put(self, state: list[float]) -> None:
        self._run.published = state
        for group in self.param_groups:
            group["alphaadam_state"] = state

    def _put_rounding(self) -> None:
        self._run.published_rounding = [FORMAT, self._run.n]
        for group in self.param_groups:
            group["alphaadam_rounding"] = self._run.published_rounding

    # ---- copies and pickles ---------------------------------------------------------------------------------------

    def __copy__(self) -> Self:
        """The same parameters and moments, the same process group, and groups and statistics of its own."""
        if self._wraps():
            return self._twin(vars(self))
        kept = self.__getstate__()
        groups = [dict(group) for group in kept["param_groups"]]
        return self._twin({**kept, "param_groups": groups, "state": kept["state"].copy()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Parameters, moments and statistics of its own, and the same process group, which is the ranks'."""
        memo[id(self)] = twin = type(self).__new__(type(self))
        return self._twin(copy.deepcopy(vars(self) if self._wraps() else self.__getstate__(), memo), twin)

    def _wraps(self) -> bool:
        """This is a wrapper that looks like an optimizer and holds one."""
        return self._run.owner() not in (self, None)

    def _twin(self, state: dict[str, Any], twin: Self | None = None) -> Self:
        twin = type(self).__new__(type(self)) if twin is None else twin
        if self._wraps():
            twin.__dict__.update(state)
        else:
            twin.__setstate__({**state, "group_left_out": False})
            twin._run.options, twin._run.group_left_out = self._run.options, self._run.group_left_out
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: all but the run and the process group."""
        self._publish()
        left_out = self._run.group_left_out or self._run.options.process_group is not None
        marks = [fsdp1.marks_of(param) for group in self.param_groups for param in group["params"]]
        return {**super().__getstate__(), "sharding": self.sharding, "group_left_out": left_out, "marks": marks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded state, torch's too. What the constructor was told wins over what a checkpoint says."""
        if "defaults" in state:  # unpickled or copied, not loaded
            self._unpickle(dict(state))
        groups, states = state.get("param_groups", self.param_groups), state.get("state", self.state)
        for group, ours in zip(groups, self.param_groups, strict=True):
            if "param_names" in ours:  # those of a checkpoint may stand in its own order, as DCP's do
                group["param_names"] = ours["param_names"]
        saved_state.take_over(type(self).__name__, groups, self.defaults, self.group_keys())
        for param in (param for group in groups for param in group["params"]):
            held = states.get(param)
            if held and "step" in held:
                device = param.device if self.defaults["capturable"] else "cpu"
                # a copy: a checkpoint may make parameters share one, which capturable counts up in place
                step = torch.as_tensor(held["step"], dtype=torch.float32, device=device)
                held["step"] = step.detach().reshape(()).clone()
            dtype = STATE_DTYPES.get(self.defaults["state_dtype"] or "", param.dtype)
            for name in self.moments:
                if held and isinstance(held.get(name), Tensor) and held[name].dtype != dtype:
                    held[name] = held[name].to(dtype)
        # nothing can fail any more; in place, for the wrappers that hold these containers
        if groups is not self.param_groups:
            self.param_groups[:] = groups
        if states is not self.state:
            self.state.clear()
            self.state.update(states)

    def _unpickle(self, state: dict[str, Any]) -> None:
        left_out, marks = state.pop("group_left_out", False), state.pop("marks", ())
        chosen = FamilyOptions.of(state["defaults"], sharding=state.pop("sharding", "auto"))
        later = {"lr_scale": 1.0, "alphaadam_rounding": INITIAL_ROUNDING}  # older pickles have none
        state["defaults"] = {**chosen.in_groups(), **later, **state["defaults"]}
        super().__setstate__(state)
        for param, its_marks in zip((p for group in self.param_groups for p in group["params"]), marks, strict=False):
            vars(param).update(its_marks)
        self._run = Run(weakref.ref(self), chosen, group_left_out=left_out)
        where = {"state": self.state, "param_groups": self.param_groups}
        self._check_saved_parameters(where)
        if left_out:
            warnings.warn(
                f"this {type(self).__name__} was pickled without its process_group, which is of the process that made "
                "it: set optimizer.process_group before the next step",
                stacklevel=3,
            )
