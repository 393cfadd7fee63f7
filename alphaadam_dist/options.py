"""The options of the optimizer: what each may be, and errors that name the field, the value and the fix."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch.distributed as dist
from torch import Tensor

CAPTURABLE = ("cuda",)
"""Devices whose steps a graph can hold."""

SHARED = (
    "gamma", "alpha_max", "threshold", "alpha_warmup", "scope", "sync", "clip_norm", "maximize", "capturable",
    "verify_every",
)  # fmt: skip
"""Options of the whole optimizer: equal in every parameter group, and the constructor's win over a checkpoint's."""


class Options(TypedDict, total=False):
    """The options that all optimizers of the family take, for type checkers. AlphaOptimizer says what they mean."""

    gamma: float
    alpha_max: float
    threshold: float
    alpha_warmup: int
    scope: str
    sync: str
    clip_norm: float | None
    sharding: str
    process_group: dist.ProcessGroup | None
    fused: bool | None
    capturable: bool
    maximize: bool
    verify_every: int


def refuse_unknown(kind: str, unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for the first unknown option of an optimizer class, with the nearest known one."""
    names = sorted(known)
    for name, value in unknown.items():
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it."
        raise TypeError(f"{kind} has no option {name!r} (={value!r}): {hint} Options: {', '.join(names)}")


def check_number(name: str, value: Any, rule: str, low: float, high: float = math.inf, *, below: bool = False) -> None:
    if isinstance(value, Tensor) and name == "lr":
        if value.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(value.shape)}: give it one element")
        if value.device.type != "cpu":
            return  # reading it would synchronise
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}: give a number, {rule}")
    if not (low <= value < high if below else low <= value <= high) or (math.isinf(value) and name != "alpha_max"):
        raise ValueError(f"{name}={value!r} is out of range: {rule}")


def check_group(kind: str, group: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Check what each parameter group of an optimizer class ``kind`` has of its own. Raises ValueError."""
    check_number("lr", group["lr"], "it must be 0 or more", 0)
    check_number("weight_decay", group["weight_decay"], "it must be 0 or more", 0)
    for name, value in {"differentiable": False, **fixed}.items():
        if group.get(name, value) != value:
            raise ValueError(f"{name}={group[name]!r}: {kind} has no such option, remove it")
    for name in ("sharding", "process_group"):
        if name in group:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group: it holds for all groups, so give it to {kind}(...)"
            )


def check_betas(betas: Any) -> None:
    """Check two decay rates. Raises ValueError."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r}: give two numbers, as in (0.9, 0.999)")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, "it must be at least 0 and less than 1", 0, 1, below=True)


def check_shared(options: Mapping[str, Any]) -> None:
    """Check the options of the whole optimizer, each by itself and against the others. Raises ValueError."""
    check_number(
        "gamma", options["gamma"], "it must be between 0 (hold conflicting coordinates) and 1 (no masks)", 0, 1
    )
    check_number("alpha_max", options["alpha_max"], "it must be 1 or more", 1)
    check_number("threshold", options["threshold"], "it must be 0 or more (0 compares signs)", 0)
    check_number("alpha_warmup", options["alpha_warmup"], "it must be 0 (none) or a number of steps", 0)
    every = options["verify_every"]
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(f"verify_every={every!r}: give a whole number of steps, or 0 for never")
    for name, choices in (("scope", ("global", "layer")), ("sync", ("exact", "delayed"))):
        if options[name] not in choices:
            raise ValueError(f"{name}={options[name]!r} is unknown: give {choices[0]!r} or {choices[1]!r}")
    if options["clip_norm"] is not None:
        check_number(
            "clip_norm", options["clip_norm"], "it must be more than 0, or None for no clipping", math.ulp(0.0)
        )
    if options["sync"] == "delayed" and options["scope"] == "layer":
        raise ValueError(
            "sync='delayed' with scope='layer' is not defined: counts of one step ago say little about one layer. "
            "Use scope='global', or sync='exact'"
        )
    if options["sync"] == "delayed" and options["clip_norm"] is not None:
        raise ValueError(
            f"sync='delayed' with clip_norm={options['clip_norm']!r}: clipping needs this step's norm before the "
            "update, which is the all-reduce that delayed avoids. Use sync='exact', or clip before step()"
        )
    if not isinstance(options["capturable"], bool):
        raise ValueError(f"capturable={options['capturable']!r}: give True or False")
    if options["capturable"] and options["sync"] == "delayed":
        raise ValueError(
            "capturable=True with sync='delayed': a CUDA graph cannot await the all-reduce of the step before. Use "
            "sync='exact'"
        )
    if options["capturable"] and options["verify_every"]:
        raise ValueError(
            f"capturable=True with verify_every={options['verify_every']!r}: the check reads values on the host, which"
            " a CUDA graph cannot. Leave verify_every=0, or capturable=False"
        )
    if options["capturable"] and options["fused"] is False:
        raise ValueError("capturable=True with fused=False: only the fast kernels can be captured, leave fused=None")


def check_saved(
    kind: str, state_dict: Mapping[str, Any], here: int, fixed: Mapping[str, Any], moments: Iterable[str]
) -> None:
    """Raise ValueError where an optimizer of ``here`` parameter groups cannot go on with a saved state.

    In a universal checkpoint of DeepSpeed the state is elsewhere, and there is nothing of it to check.
    """
    saved = len(state_dict["param_groups"])
    if saved != here:
        raise ValueError(
            f"the checkpoint has {saved} parameter groups, this optimizer has {here}: the groups must be those it was "
            "saved with (in a DeepSpeed config, adding or removing no_decay changes them)"
        )
    for group in state_dict["param_groups"]:
        for name, value in fixed.items():
            if group.get(name, value) != value:
                raise ValueError(
                    f"the checkpoint has {name}={group[name]!r}, which {kind} does not have: load it into the "
                    "optimizer that wrote it"
                )
    for state in state_dict.get("state", {}).values():
        names = set(state) - {"step"}
        if names and names != set(moments):
            raise ValueError(
                f"the checkpoint has {', '.join(sorted(names))} of a parameter, where {kind} keeps "
                f"{', '.join(moments)}: it was written by another optimizer. Load it there, or begin without its state"
            )


def check_fused(fused: Any) -> None:
    """Raises ValueError where it is neither None nor True or False."""
    if fused is not None and not isinstance(fused, bool):
        raise ValueError(f"fused={fused!r}: give None (the fast kernels where they pay), True or False")


def refuse_zero_redundancy(kind: str) -> None:
    """Raise ValueError where torch's ZeroRedundancyOptimizer is building the optimizer that calls this.

    It gives each rank an optimizer over some of the parameters and says nothing of the others.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            raise ValueError(
                f"ZeroRedundancyOptimizer(optimizer_class={kind}) is not served: each rank would get an alpha of its "
                "own, from its own parameters. Use torch.distributed.fsdp.fully_shard(model, "
                "reshard_after_forward=False), or DeepSpeed's ZeRO stage 1, which shard the state too"
            )
