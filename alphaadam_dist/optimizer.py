"""What AlphaAdam, AlphaLion and AlphaSGD share: a torch.optim.Optimizer for parameters sharded in any way.

A step is three acts. **Count**: read (g, m) of every local shard. **Reduce**: one all-reduce makes the counts those
of the whole model, and alpha follows. **Update**: write the parameters and their moments. With ``sync="delayed"`` the
update counts as it goes and its alpha comes from the counts of the step before. Under DeepSpeed's ZeRO the wrapper
calls ``step()`` once per partition, so ``zero/`` plays the acts itself, through ``open_step``, ``count`` and
``close_step``.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from . import consistency, kernels, model_ranks, one_model, options, replicas
from .eager import eager
from .kernels import consensus
from .kernels.reference import squared_norms
from .layout import Layout, build_layout, statistics_device
from .local_tensors import LocalTensors, Owned, by_device, local_tensors, owned_of_flat
from .persistence import Persistent, Run
from .shards import Shard, clean_names, fsdp1
from .shards.select import shards_of
from .statistics import INITIAL_STATE
from .tensors import check_kind, check_places, local


class AlphaOptimizer(Persistent):
    """A momentum optimizer that steps where momentum and gradient agree, and makes up for where they conflict.

    The result is the same however the model is sharded: build it after sharding and use it like torch's optimizers.
    The algorithm is arXiv 2501.18094 as defined in :mod:`alphaadam_dist.rule`. What is written here is common to the
    family; a subclass names its direction, one function of that module, and what this reads and keeps.

    Args:
        params: tensors, named_parameters() or groups of either; plain tensors or DTensors. Names make layer
            statistics readable and tell parameters apart across pipeline stages.
        hyperparameters: those of the class attribute of this name, with the values for groups that don't say.
        gamma: share of its step that a conflicting coordinate keeps, 0 to 1; 1 is the optimizer without masks.
        alpha_max: bound on alpha, 1 or more.
        threshold: tau; opposition weaker than tau * g^2 is no conflict. 0 compares signs only.
        alpha_warmup: number of steps over which the masks gain their strength.
        scope: "global": one alpha for the whole model; "layer": one for each parameter.
        sync: "exact": this step's counts make this step's alpha; "delayed": the last step's do, which costs no extra
            pass over memory and hides the communication.
        clip_norm: clip gradients by their global L2 norm inside the step; exact only.
        sharding: what plain tensors are: "replicated": whole on every rank; "sharded": a different part of the
            parameter on each rank; "auto": whole, but for the shards of FSDP1, which are marked.
        process_group: the ranks that hold the model. By default all; it must be given for FSDP1, pipeline stages, and
            DTensors whose meshes are smaller than the world.
        fused: True: the fast kernels, one pass over memory; False: the reference, in torch operations; None: the fast
            ones for models of a million parameters and more, where they can be had (see :mod:`.kernels`).
        capturable: a CUDA graph may hold the step: nothing in it waits for the device, ``step`` lies there too. Needs
            fp32 or fp64 parameters on a GPU, and sync="exact". Give lr as a tensor to change it between replays.
        maximize: ascend.
        verify_every: every so many steps check that all ranks hold the same statistics and options, and replicas the
            same parameters, from the first on; 0 is never, and N must be the same on every rank. One more all-reduce on
            those steps, also between replicas, which synchronises.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range, options that contradict each other, a parameter of a kind not served.
    """

    direction: ClassVar[Callable[..., None]]
    """One update of one tensor: ``direction(param, grad, *moments, f, **hyperparameters)``, as in rule.py."""
    moments: ClassVar[tuple[str, ...]]
    """The state tensors of a parameter, each of its shape. The masks compare the gradient with the first."""
    counts_steps: ClassVar[bool] = False
    """Whether the state has ``step``, the number of the parameter's updates, and the direction takes it."""
    hyperparameters: ClassVar[tuple[str, ...]]
    """What each parameter group may have of its own and the direction takes; "lr" and "weight_decay" among them."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Group keys of the torch optimizer whose checkpoints are exchanged, with the one value that is served."""

    def __init__(
        self,
        params: ParamsT,
        hyperparameters: Mapping[str, Any],
        *,
        gamma: float = 0.0,
        alpha_max: float = 4.0,
        threshold: float = 0.0,
        alpha_warmup: int = 0,
        scope: str = "global",
        sync: str = "exact",
        clip_norm: float | None = None,
        sharding: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        maximize: bool = False,
        verify_every: int = 0,
        **unknown: Any,
    ) -> None:
        kind = type(self).__name__
        options.refuse_unknown(kind, unknown, list(inspect.signature(type(self)).parameters)[1:], self.fixed)
        one_model.refuse_zero_redundancy(kind)
        defaults = {
            **hyperparameters, "gamma": gamma, "alpha_max": alpha_max, "threshold": threshold,
            "alpha_warmup": alpha_warmup, "scope": scope, "sync": sync, "clip_norm": clip_norm, "maximize": maximize,
            "capturable": capturable, "fused": fused, "verify_every": verify_every,
            "alphaadam_state": INITIAL_STATE, "foreach": None, "differentiable": False, **self.fixed,
        }  # fmt: skip
        self.sharding = options.check_option("sharding", sharding)
        self._check_group(defaults)
        options.check_together(defaults)
        self._run = Run(weakref.ref(self), process_group)
        super().__init__(params, defaults)
        self._reduce_group([self._shards_of(*named) for named in self._named_parameters()])  # for its errors
        from .zero.registration import wrap_engine  # not at the top: it imports this module

        wrap_engine()

    def __init_subclass__(cls) -> None:
        """Give the class the signature it has with the options of the family, for help() and error messages."""
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        family = inspect.signature(AlphaOptimizer.__init__).parameters.values()
        named = [p for p in own if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in named}
        named += [p for p in family if p.kind is p.KEYWORD_ONLY and p.name not in taken]
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
            self._check_shared(group, f"parameter group {len(self.param_groups) - 1}")
            for name, param in self._named_parameters(len(self.param_groups) - 1):
                check_kind(name, param, type(self).__name__)
                self._shards_of(name, param)  # for its errors
                if group["capturable"] and param.device.type not in options.CAPTURABLE:
                    raise ValueError(
                        f"capturable=True with a parameter on {param.device}: it takes parameters on a GPU. Move the "
                        "model there before building the optimizer, or leave capturable=False"
                    )
            self._warn_of_misspelt_keys(group)
        except Exception:
            self.param_groups.pop()
            raise
        consensus.say(self.defaults, [param for group in self.param_groups for param in group["params"]])

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check all values of a parameter group, and make numbers of other libraries Python's own."""
        options.check_group(type(self).__name__, group, self.hyperparameters)
        self.check_hyperparameters(group)

    def _check_shared(self, group: Mapping[str, Any], where: str) -> None:
        for name in (*options.SHARED, "fused"):
            if group.get(name, self.defaults[name]) != self.defaults[name]:
                raise ValueError(
                    f"{name}={group[name]!r} in {where} contradicts {name}={self.defaults[name]!r} of the optimizer: "
                    f"{name} holds for all groups, so give it to {type(self).__name__}(...) and leave it out of groups"
                )

    def _warn_of_misspelt_keys(self, group: Mapping[str, Any]) -> None:
        known = {*self.defaults, *options.UNCHANGING, "params", "param_names"} | self._run.warned
        names = (*self.hyperparameters, *options.SHARED, "fused")
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
        if self.defaults["scope"] == "global":
            return statistics.state()[1]
        if statistics.layout is None:
            return {}
        alphas = statistics.alphas()
        return {key: alphas[row] for row, key in sorted(statistics.layout.keys.items(), key=lambda item: item[1])}

    @property
    def agreement(self) -> dict[str, float]:
        """Coordinates of the whole model that agreed and conflicted in the last step, and their share of it.

        dict(agree=int, conflict=int, evidence_fraction=float). The fraction is 0 until this process has stepped.
        Synchronises.
        """
        _, _, agree, conflict = self._adopt().state()
        return {"agree": int(agree), "conflict": int(conflict), "evidence_fraction": self._share(agree + conflict)}

    def _share(self, evidence: float) -> float:
        return evidence / self._run.layout.numel if self._run.layout is not None and self._run.layout.numel else 0.0

    def metrics(self) -> dict[str, float]:
        """The last step in numbers to log. Synchronises.

        dict(alpha, agreement, evidence, steps): alpha of the whole model also with scope="layer", the agreeing share
        of the evidence (1 before the first step), the evidence's share of the model, and T.
        """
        steps, alpha, agree, conflict = self._adopt().state()
        evidence = agree + conflict
        agreement = agree / evidence if evidence else 1.0
        return {"alpha": alpha, "agreement": agreement, "evidence": self._share(evidence), "steps": steps}

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
        if self._run.driven:
            self._step_part()
            return loss
        self._refuse_part_of_model()
        layout = self._current_layout()
        self.open_step(layout)
        held = self._held(layout)
        if self.defaults["sync"] == "exact":
            self._count([owned for _, part in held for owned in part.owned()], None)
        self._update(held)
        self.close_step()
        return loss

    def _refuse_part_of_model(self) -> None:
        """Raise ValueError where this optimizer should know the whole model and knows only a part of it."""
        kind, option = type(self).__name__, one_model.of_the_whole(self.defaults)
        if option is None or self._run.fixed_layout:
            return
        one_model.refuse_in_backward(kind, option)
        if sum(len(group["params"]) for group in self.param_groups) == 1:
            ((name, param),) = self._named_parameters()
            if len(fsdp1.keys(param, name)) == 1:  # a FlatParameter is many
                one_model.refuse_one_per_parameter(kind, option, name, param)

    def use_layout(self, layout: Layout, *, driven: bool) -> None:
        """Take the layout from outside. ``driven``: the caller opens, counts and closes each step, ``step`` updates."""
        self._run.layout = layout
        self._run.fixed_layout = True
        self._run.driven = driven

    def open_step(self, layout: Layout) -> None:
        """A step of the whole model begins. Whatever an unfinished one counted is forgotten."""
        for i, group in enumerate(self.param_groups):
            self._check_shared(group, f"parameter group {i}")
        self._run.layout = layout
        self._run.counted = False
        statistics = self._adopt()
        statistics.open(layout)
        every = self.defaults["verify_every"]
        if every and (statistics.opened - 1) % every == 0:
            consistency.check(self, layout, statistics)

    def close_step(self) -> None:
        """A step of the whole model has been applied."""
        if self.defaults["sync"] == "delayed":
            self._adopt().close()

    def count(self, gradients: Iterable[tuple[Tensor, Sequence[Tensor]]], scale: Tensor | float | None = None) -> None:
        """Count the whole model's masks and reduce them: the first two acts of an exact step. Collective.

        Args:
            gradients: for every local optimizer parameter that has one its gradient, in pieces that concatenate to
                the flattened local tensor. Scaled by any positive factor if the threshold is 0.
            scale: multiplies the gradients into true ones where the threshold needs that.
        """
        layout = self._run.layout
        assert layout is not None
        owned: list[Owned] = []
        for param, pieces in gradients:
            momentum = local(self._state(param)[self.moments[0]])
            owned += owned_of_flat(layout.segments[param], pieces, momentum)
        self._count(owned, scale)

    def _count(self, owned: Sequence[Owned], scale: Tensor | float | None) -> None:
        """The first two acts, on all that this rank counts."""
        statistics = self._run.statistics
        assert statistics is not None
        threshold = self.defaults["threshold"]
        clip = self.defaults["clip_norm"] is not None
        assert self._run.layout is not None
        parts = by_device(owned, self._run.layout)
        if clip and threshold > 0:
            for segments, grads, momenta in parts:
                statistics.add_norms(segments, squared_norms(grads, momenta))
            statistics.reduce_norm()
            scale = statistics.clip_coefficient()
        for segments, grads, momenta in parts:
            counts, norms = self._kernels(grads).count(
                grads, momenta, threshold=threshold, scale=self._directed(scale), norms=clip and threshold == 0
            )
            if norms is not None:
                statistics.add_norms(segments, norms)
            statistics.add(segments, counts)
        statistics.reduce()
        self._run.counted = True

    def _step_part(self) -> None:
        """Update the part of the model that DeepSpeed has put into the groups."""
        if self._run.layout is None or not (self.defaults["sync"] == "delayed" or self._run.counted):
            raise RuntimeError(
                "step() was called on a part of the model before the whole of it was counted: DeepSpeed's wrapper did "
                "not run through the hooks of alphaadam_dist. Call engine.step(), never the optimizer's own step()"
            )
        self._update(self._held(self._run.layout))

    def _held(self, layout: Layout) -> list[tuple[dict[str, Any], LocalTensors]]:
        """What is held of each parameter group on each device, beside the group."""
        groups = self.param_groups
        return [
            (group, part)
            for group in groups
            for part in local_tensors(group["params"], layout, self.moments, self._state)
        ]

    def _update(self, held: Sequence[tuple[dict[str, Any], LocalTensors]]) -> None:
        """The third act."""
        statistics = self._run.statistics
        assert statistics is not None
        delayed = self.defaults["sync"] == "delayed"
        scale = self._directed(statistics.clip_coefficient())
        for group, part in held:
            counts = self._kernels(part.params).update(
                self.direction,
                part.params,
                part.grads,
                part.moments,
                strengths=statistics.strengths(part.segments),
                threshold=self.defaults["threshold"],
                scale=scale,
                counting=delayed,
                steps=part.advance_steps(self.defaults["capturable"]) if self.counts_steps else None,
                hyperparameters={name: options.plain(name, group[name]) for name in self.hyperparameters},
            )
            if counts is not None:
                statistics.add(part.segments, counts)

    def _directed(self, scale: Tensor | float | None) -> Tensor | float | None:
        """What makes a gradient the true one: ``scale``, negative to maximize; None where it is that already."""
        if not self.defaults["maximize"]:
            return scale
        return -1.0 if scale is None else -scale

    def _kernels(self, tensors: Sequence[Tensor]) -> ModuleType:
        """Those for the device of these tensors, of which there is one or more."""
        assert self._run.layout is not None
        return kernels.choose(
            consensus.fused(self.defaults, self._run.layout), tensors[0].device, self._run.layout.numel
        )

    def _state(self, param: Tensor) -> dict[str, Any]:
        """The parameter's state, created as torch's optimizers create it where there is none."""
        state = self.state[param]
        if self.moments[0] not in state:  # DeepSpeed leaves empty dicts behind, trainers keys of their own
            if self.counts_steps:
                device = param.device if self.defaults["capturable"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            like = param if isinstance(param, DTensor) else local(param)
            for name in self.moments:
                state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        return state

    # ---- the layout -----------------------------------------------------------------------------------------------

    def _current_layout(self) -> Layout:
        """The layout, built anew (collective) when the parameters are not those it was built for."""
        layout = self._run.layout
        if layout is not None and self._run.fixed_layout:
            return layout
        params = [param for group in self.param_groups for param in group["params"]]
        places = [id(p) for p in params], [p.shape for p in params], [p.device for p in params]
        if layout is not None and layout.places == places:
            return layout
        named = self._named_parameters()
        held = [self._shards_of(name, param) for name, param in named]
        check_places(named, self.state, self.moments, capturable=self.defaults["capturable"])
        group = self._reduce_group(held)
        layout = build_layout(
            params,
            held,
            [local(param).numel() for param in params],
            scope=self.defaults["scope"],
            group=group,
            device=statistics_device(params, group),
            names=[key for name, param in named for key in fsdp1.keys(param, name)],
        )
        layout.places = places
        consensus.settle(layout, self.defaults)
        replicas.prove(layout, self)
        return layout

    def _named_parameters(self, first_group: int = 0) -> list[tuple[str, Tensor]]:
        names = [
            group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            for i, group in enumerate(self.param_groups)
        ]
        clean = clean_names(name for of_group in names for name in of_group)
        return [
            (clean[name], param)
            for of_group, group in list(zip(names, self.param_groups, strict=True))[first_group:]
            for name, param in zip(of_group, group["params"], strict=True)
        ]

    def _shards_of(self, name: str, param: Tensor) -> list[Shard]:
        named = "param_names" in self.param_groups[0]
        return shards_of(param, name, named=named, sharding=self.sharding, group=self.process_group)

    def _reduce_group(self, held: Sequence[Sequence[Shard]]) -> dist.ProcessGroup | None:
        return model_ranks.reduce_group(self.param_groups, held, self.process_group)
