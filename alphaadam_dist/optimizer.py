"""What AlphaAdam, AlphaLion and AlphaSGD share: a torch.optim.Optimizer for parameters sharded in any way.

A step is four acts, which step.py plays. Under DeepSpeed's ZeRO the wrapper calls ``step()`` once per partition, so
``zero/`` drives the acts itself.
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.nn import Module
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import group_agreement, one_model, options, parameters, torch_versions
from .eager import eager
from .import_hook import when_imported
from .in_backward import StepInBackward
from .kernels import consensus
from .options import FamilyOptions
from .persistence import Persistent, Run
from .rounding import INITIAL_ROUNDING
from .statistics import INITIAL_STATE
from .step import Step


class AlphaOptimizer(Persistent):
    """A momentum optimizer that steps where momentum and gradient agree, and makes up for where they conflict.

    The result is the same however the model is sharded: build it after sharding and use it like torch's optimizers.
    The algorithm is arXiv 2501.18094 as defined in :mod:`alphaadam_dist.rule`. What is written here is common to the
    family; a subclass names its direction, one function of that module, and what this reads and keeps.

    Args:
        params: tensors, named_parameters() or groups of either; plain tensors or DTensors. Names make layer
            statistics readable and tell parameters apart across pipeline stages.
        hyperparameters: those of the class attribute of this name, with the values for groups that don't say.
        family: the options of :class:`.options.FamilyOptions`.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range, options that contradict each other, a parameter of a kind not served.
    """

    _when_made: ClassVar[list[Callable[[], object]]] = []
    """What backends do whenever an optimizer is made."""

    def __init__(self, params: ParamsT, hyperparameters: Mapping[str, Any], **family: Unpack[options.Options]) -> None:
        kind = type(self).__name__
        given: dict[str, Any] = {name: value for name, value in family.items() if name in options.NAMES}
        unknown = {name: value for name, value in family.items() if name not in options.NAMES}
        options.refuse_unknown(kind, unknown, list(inspect.signature(type(self)).parameters)[1:], self.fixed)
        one_model.refuse_zero_redundancy(kind)
        chosen = FamilyOptions(**given)
        defaults = {
            **hyperparameters, "lr_scale": 1.0, **chosen.in_groups(), "alphaadam_state": INITIAL_STATE,
            "alphaadam_rounding": INITIAL_ROUNDING, "foreach": None, "differentiable": False, **self.fixed,
        }  # fmt: skip
        self._check_group(defaults)
        self._run = Run(weakref.ref(self), chosen)
        super().__init__(params, defaults)
        parameters.check_ranks(self)
        torch_versions.warn_untested()
        for act in self._when_made:
            act()

    def __init_subclass__(cls) -> None:
        """Give the class the signature and the docstring that it has with the options of the family."""
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        named = [p for p in own if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in named}
        named += [p for p in inspect.signature(FamilyOptions).parameters.values() if p.name not in taken]
        meanings = inspect.cleandoc(FamilyOptions.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "").replace("    family: the options of FamilyOptions.", meanings)
        cls.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]

    @classmethod
    def check_hyperparameters(cls, group: Mapping[str, Any]) -> None:
        """Check what a parameter group has of its own beside lr and weight_decay. Raises ValueError."""

    # ---- parameter groups -----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError, and adds nothing, where it contradicts an option of the whole optimizer."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            options.refuse_unserved(type(self).__name__, group, self.fixed)
            self._check_group(group)
            place = len(self.param_groups) - 1
            options.check_shared(type(self).__name__, self._run.options, group, f"parameter group {place}")
            parameters.check(self, place)
            for param in group["params"]:
                if group["capturable"] and param.device.type not in options.CAPTURABLE:
                    raise ValueError(
                        f"capturable=True with a parameter on {param.device}: it takes parameters on a GPU. Move the "
                        "model there before building the optimizer, or leave capturable=False"
                    )
            self._warn_of_misspelt_keys(group)
        except Exception:
            self.param_groups.pop()
            raise
        consensus.say(self._run.options, lambda: [param for _, param in parameters.served(self)])

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check all values of a parameter group, and make numbers of other libraries Python's own."""
        options.check_group(type(self).__name__, group, self.hyperparameters)
        options.refuse_lookahead(type(self).__name__, group, looks_ahead=self.looks_ahead)
        self.check_hyperparameters(group)

    def _warn_of_misspelt_keys(self, group: Mapping[str, Any]) -> None:
        known = {*self.defaults, *options.UNCHANGING, "params", "param_names"} | self._run.warned
        names = (*self.group_keys(), *options.IN_GROUPS)
        for key, name in options.misspelt_keys(group, names, known).items():
            self._run.warned.add(key)
            warnings.warn(
                f"{key}={group[key]!r} in a parameter group is no option of {type(self).__name__} and changes nothing: "
                f"did you mean {name!r}?",
                stacklevel=3,
            )

    # ---- what a user reads ----------------------------------------------------------------------------------------

    @property
    def alpha(self) -> float | dict[str, float]:
        """alpha of the last step; with scope="layer" a dict of parameter name -> alpha. Synchronises.

        1 before the first step. A checkpoint does not carry the alphas by layer: they read 1 until the next step that
        has evidence, also after parameters have come or gone.
        """
        statistics = self._adopt()
        if self._run.options.scope == "global":
            return statistics.state()[1]
        if statistics.layout is None:
            return {}
        alphas = statistics.alphas()
        return {key: alphas[row] for row, key in sorted(statistics.layout.keys.items(), key=lambda item: item[1])}

    @property
    def agreement(self) -> dict[str, float]:
        """Coordinates of the whole model that agreed and conflicted in the last step, and their share of it.

        dict(agree=int, conflict=int, evidence_fraction=float). The fraction is 0 until this process has stepped, and
        all are 0 with gamma=1, where nothing is counted. Synchronises.
        """
        _, _, agree, conflict = self._adopt().state()
        return {"agree": int(agree), "conflict": int(conflict), "evidence_fraction": self._share(agree + conflict)}

    def _share(self, evidence: float) -> float:
        return evidence / self._run.layout.numel if self._run.layout is not None and self._run.layout.numel else 0.0

    def metrics(self) -> dict[str, float | None]:
        """The last step in numbers to log. Synchronises.

        dict(alpha, agreement, evidence, steps): alpha of the whole model also with scope="layer", the agreeing share
        of the evidence (1 before the first step), the evidence's share of the model, and T. With gamma=1 agreement and
        evidence are None: nothing is counted. With clip_norm, skip_nonfinite or telemetry also grad_norm, the norm of
        the whole model's gradient before clipping (None before the first step), with skip_nonfinite skipped, how many
        steps of this process were left out. With telemetry also update_norm, the norm of what a step added to the
        parameters, decay and rounding included: of the last step with sync="delayed" or gamma=1; where a step reads all
        gradients first (sync="exact", clip_norm, skip_nonfinite) of the last one applied before it. None until it is
        known. Under DeepSpeed grad_norm is DeepSpeed's own, None where it takes none.
        """
        statistics = self._adopt()
        steps, alpha, agree, conflict = statistics.state()
        chosen, evidence = self._run.options, agree + conflict
        found: dict[str, float | None] = {"alpha": alpha, "agreement": None, "evidence": None, "steps": steps}
        if chosen.masked:
            found |= {"agreement": agree / evidence if evidence else 1.0, "evidence": self._share(evidence)}
        if chosen.with_norm or chosen.telemetry:
            driver = self._run.driver
            theirs = None if driver is None else driver.grad_norm
            found["grad_norm"] = statistics.norm() if theirs is None else theirs()
        if chosen.telemetry:
            found["update_norm"] = statistics.update_norm()
        if chosen.skip_nonfinite:
            found["skipped"] = float(statistics.skipped)
        return found

    @torch.no_grad()
    def agreement_by_group(self) -> list[dict[str, float]]:
        """How far the gradients that are there now agree with the momentum, for each parameter group in its order.

        To be asked on all ranks, between a backward and its step: one pass over memory and one all-reduce, 16 bytes a
        group. Collective where the model is sharded; synchronises, and changes nothing.

        Returns:
            dict(agree=int, conflict=int, agreement=float): the agreeing share is 1 where a group has no evidence.

        Raises:
            ValueError: the gradients are not in the parameters, or the threshold would need them clipped.
        """
        self._adopt()
        chosen, kind = self._run.options, type(self).__name__
        if self._run.driver is not None or self._run.in_backward is not None:
            where = "under DeepSpeed" if self._run.driver is not None else "with step_in_backward"
            raise ValueError(
                f"agreement_by_group() of a {kind} {where}, where gradients are not left in the parameters: read "
                "metrics(), which is the whole model's"
            )
        if chosen.clip_norm is not None and chosen.threshold > 0:
            raise ValueError(
                f"agreement_by_group() with clip_norm={chosen.clip_norm!r} and threshold={chosen.threshold!r}: the "
                "threshold compares clipped gradients, which only the step knows. Leave one of them out"
            )
        self._run.layout = parameters.current_layout(self)
        counts = group_agreement.counts_by_group(self, self._run.layout).tolist()
        return [{"agree": int(a), "conflict": int(c), "agreement": a / (a + c) if a + c else 1.0} for a, c in counts]

    # ---- the step -------------------------------------------------------------------------------------------------

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Collective where the model is sharded.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        in_backward, driver = self._run.in_backward, self._run.driver
        if in_backward is not None and in_backward.end(self):
            return loss
        if driver is not None and driver.update_part is not None:
            driver.update_part()
            return loss
        if driver is None:
            parameters.refuse_part_of_model(self)
        step = Step(self, parameters.current_layout(self) if driver is None else driver.layout)
        if step.may("count"):
            step.count()
        step.update()
        step.close()
        return loss

    def step_in_backward(self, model: Module) -> StepInBackward:
        """From now on each parameter steps in the backward, as its gradient arrives, and the gradient is freed.

        The result is that of step() after backward, bit for bit. Call step() after every backward all the same: it
        checks that the step was taken, and schedulers count by it. Needs sync="delayed". Collective where the model
        is sharded.

        Args:
            model: the module that holds the parameters, as DDP or FSDP2 wraps it.

        Returns:
            a handle, whose ``remove()`` undoes this.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: the result would not be that of step(), with the way out.
            RuntimeError: the optimizer steps in backward already.
        """
        return StepInBackward(self._run.owner() or self, model)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler calls step() whatever it saw: in backward it saw no gradients, and step() refuses it."""
        return self._run.in_backward is not None


when_imported(one_model.ZERO_REDUNDANCY, one_model.watch_zero_redundancy)
