"""The options of the optimizer: what each may be, and errors that name the field, the value and the fix."""

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from . import rounding

CAPTURABLE = ("cuda",)
"""Devices whose steps a graph can hold."""


UNCHANGING: Mapping[str, tuple[Any, ...]] = {
    "foreach": (None, False),
    "_foreach": (None, False),
    "differentiable": (False,),
    "amsgrad": (False,),
    "adam_w_mode": (True,),
    "torch_adam": (True, False),
}
"""Options of torch's and DeepSpeed's optimizers that these don't have, with the values that change nothing: a copied
config may have them."""

OTHER_NAMES: Mapping[str, str] = {
    "learning_rate": "lr", "wd": "weight_decay", "epsilon": "eps", "beta1": "betas", "beta2": "betas",
}  # fmt: skip


def refuse_unknown(kind: str, given: Mapping[str, Any], known: Iterable[str], fixed: Mapping[str, Any]) -> None:
    """Raise TypeError for the first unknown option of an optimizer class that could change something."""
    names = sorted(known)
    for name, value in given.items():
        if _changes_nothing(name, value, fixed):
            continue
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it."
        raise TypeError(f"{kind} has no option {name!r} (={value!r}): {hint} Options: {', '.join(names)}")


def _changes_nothing(name: str, value: Any, fixed: Mapping[str, Any]) -> bool:
    value = plain(name, value)
    served = (fixed[name],) if name in fixed else UNCHANGING.get(name, ())
    return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in served)


def plain(name: str, value: Any) -> Any:
    """A number of numpy, torch, fractions or decimal as Python's own; betas as a tuple; anything else as it is.

    A learning rate that is a tensor stays one. Raises ValueError where a number is too large for a float.
    """
    if isinstance(value, (bool, str)) or type(value) is float or (name == "lr" and isinstance(value, Tensor)):
        return value
    if type(value) is tuple and all(type(one) is float for one in value):
        return value  # steps ask too, so what is usual is quick
    if hasattr(value, "dtype") and hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, (int, numbers.Real, Decimal)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} is a number too large for a float: give a smaller one") from None
        return int(value) if isinstance(value, numbers.Integral) else number
    if name == "betas" and not isinstance(value, (bytes, Mapping, Set)):
        try:
            return tuple(plain(f"betas[{i}]", beta) for i, beta in enumerate(value))
        except TypeError:  # nothing to go through: check_betas says so
            return value
    return value


def check_number(name: str, value: Any, rule: str, low: float, high: float = math.inf, *, below: bool = False) -> Any:
    """The number as Python's own, but a tensor for lr as it is. Raises ValueError where it is none or out of range."""
    value = number = plain(name, value)
    if isinstance(value, Tensor) and name == "lr":
        if value.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(value.shape)}: give it one element")
        if value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"lr is a tensor of dtype {value.dtype}: give it a real number, {rule}")
        if value.device.type != "cpu":
            return value  # reading it would synchronise
        number = float(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"{name}={number!r} is a {type(number).__name__}: give a number, {rule}")
    if not (low <= number < high if below else low <= number <= high) or (math.isinf(number) and name != "alpha_max"):
        raise ValueError(f"{name}={number!r} is out of range: {rule}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """The bool, numpy's too, as Python's own. Raises ValueError for anything else: any text would be true."""
    flag = plain(name, value)
    if not isinstance(flag, bool):
        raise ValueError(f"{name}={value!r}: give True or False")
    return flag


def check_betas(betas: Any) -> None:
    """Check two decay rates. Raises ValueError."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r}: give two numbers, as in (0.9, 0.999)")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, "it must be at least 0 and less than 1", 0, 1, below=True)


def _number(default: Any, rule: str, low: float, high: float = math.inf, *, or_none: bool = False) -> Any:
    """A field that is a number from low to high; with ``or_none`` None is taken too."""

    def check(name: str, value: Any) -> Any:
        return None if or_none and value is None else check_number(name, value, rule, low, high)

    return field(default=default, metadata={"check": check})


def _choice(*choices: str) -> Any:
    """A field that is one of these texts, by default the first."""

    def check(name: str, value: Any) -> str:
        *others, last = map(repr, choices)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: give {', '.join(others)} or {last}")
        return str(value)

    return field(default=choices[0], metadata={"check": check})


def _flag() -> Any:
    """A field that is True or False, by default False."""
    return field(default=False, metadata={"check": check_flag})


def _check_fused(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(plain(name, value), bool):
        raise ValueError(f"{name}={value!r}: give None (the fast kernels where they pay), True or False")
    return None if value is None else bool(value)


def _check_every(name: str, value: Any) -> int:
    every = plain(name, value)
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(f"{name}={value!r}: give a whole number of steps, or 0 for never")
    return every


def _check_state_dtype(name: str, value: Any) -> str | None:
    named = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if named is not None and (not isinstance(named, str) or named not in rounding.STATE_DTYPES):
        served = " or ".join(map(repr, rounding.STATE_DTYPES))
        raise ValueError(f"{name}={value!r} is not served: give {served}, or None for the parameters' own")
    return named


def _check_seed(name: str, value: Any) -> int:
    seed = plain(name, value)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < rounding.SEEDS:
        raise ValueError(f"{name}={value!r}: give a whole number, 0 or more and less than 2^64")
    return seed


@dataclass(frozen=True, kw_only=True)
class FamilyOptions:
    """The options that all optimizers of the family take. They hold for the whole optimizer.

    Args:
        gamma: share of its step that a conflicting coordinate keeps, 0 to 1; 1 is the optimizer without masks, where
            nothing is counted, and no rank waits for another without clip_norm, skip_nonfinite and telemetry.
        lookahead: c, 0 or more: the direction is (m^ + c g) / (1 + c) in place of the bias-corrected momentum m^, the
            masks on top of it; AlphaAdam's alone.
        alpha_max: bound on alpha, 1 or more.
        threshold: tau; opposition weaker than tau * g^2 is no conflict. 0 compares signs only.
        alpha_warmup: number of steps over which the masks gain their strength.
        scope: "global": one alpha for the whole model; "layer": one for each parameter.
        sync: "exact": this step's counts make this step's alpha; "delayed": the last step's do, which costs no extra
            pass over memory and hides the communication.
        clip_norm: clip gradients by their global L2 norm inside the step; exact only.
        skip_nonfinite: leave out a step whose gradients, all together, have a norm that is NaN or infinite, on all
            ranks; exact only. The norm travels with the counts; one number is read on the host in every step.
        telemetry: metrics() has the norms of the whole model's gradient and of its update too. They travel with the
            counts, 16 bytes more, and no step waits for them.
        sharding: what plain tensors are: "replicated": whole on every rank; "sharded": a different part of the
            parameter on each rank; "auto": whole, but for the shards of FSDP1, which are marked.
        process_group: the ranks that hold the model. By default all; it must be given for FSDP1, pipeline stages, and
            DTensors whose meshes are smaller than the world.
        fused: True: the fast kernels, one pass over memory, or an error that says why not and for which parameter;
            False: the reference, in torch operations, some ten times slower or more; None: the fast ones for models of
            a million parameters and more, where they can be had (see :mod:`.kernels`).
        capturable: a CUDA graph may hold the step: nothing in it waits for the device, ``step`` lies there too. Needs
            fp32 or fp64 parameters on a GPU, and sync="exact". Give lr as a tensor to change it between replays.
        maximize: ascend.
        verify_every: every so many steps check that all ranks hold the same statistics and options, and replicas the
            same parameters, from the first on; 0 is never, and N must be the same on every rank. One more all-reduce on
            those steps, also between replicas, which synchronises.
        state_dtype: "bfloat16": moments in bf16, of parameters in fp32 or bf16. All is computed in fp32, and what is
            kept in bf16 is rounded stochastically, by the same random bits under any sharding (see :mod:`.rounding`).
            None: moments in the parameters' dtype, rounded as torch does.
        rounding_seed: of these random bits, 0 or more and less than 2^64.

    Raises:
        ValueError: an option out of range, or options that contradict each other.
    """

    gamma: float = _number(0.0, "it must be between 0 (hold conflicting coordinates) and 1 (no masks)", 0, 1)
    lookahead: float = _number(0.0, "it must be 0 (none) or more", 0)
    alpha_max: float = _number(4.0, "it must be 1 or more", 1)
    threshold: float = _number(0.0, "it must be 0 or more (0 compares signs)", 0)
    alpha_warmup: int = _number(0, "it must be 0 (none) or a number of steps", 0)
    scope: str = _choice("global", "layer")
    sync: str = _choice("exact", "delayed")
    clip_norm: float | None = _number(
        None, "it must be more than 0, or None for no clipping", math.ulp(0.0), or_none=True
    )
    skip_nonfinite: bool = _flag()
    telemetry: bool = _flag()
    sharding: str = _choice("auto", "replicated", "sharded")
    process_group: dist.ProcessGroup | None = None
    fused: bool | None = field(default=None, metadata={"check": _check_fused})
    capturable: bool = _flag()
    maximize: bool = _flag()
    verify_every: int = field(default=0, metadata={"check": _check_every})
    state_dtype: str | None = field(default=None, metadata={"check": _check_state_dtype})
    rounding_seed: int = field(default=0, metadata={"check": _check_seed})

    def __post_init__(self) -> None:
        """Check each by itself, its numbers as Python's own, then all against each other."""
        for name in NAMES:
            object.__setattr__(self, name, check_option(name, getattr(self, name)))
        if self.sync == "delayed" and self.scope == "layer":
            raise ValueError(
                "sync='delayed' with scope='layer' is not defined: counts of one step ago say little about one layer. "
                "Use scope='global', or sync='exact'"
            )
        if self.sync == "delayed" and self.clip_norm is not None:
            raise ValueError(
                f"sync='delayed' with clip_norm={self.clip_norm!r}: clipping needs this step's norm before the update, "
                "which is the all-reduce that delayed avoids. Use sync='exact', or clip before step()"
            )
        if self.skip_nonfinite and (self.sync == "delayed" or self.capturable):
            other = "sync='delayed'" if self.sync == "delayed" else "capturable=True"
            raise ValueError(
                f"skip_nonfinite=True with {other}: whether a step is left out must be known on the host before the "
                "update begins. Use sync='exact' and capturable=False, or leave skip_nonfinite out"
            )
        if self.capturable and self.sync == "delayed":
            raise ValueError(
                "capturable=True with sync='delayed': a CUDA graph cannot await the all-reduce of the step before. Use "
                "sync='exact'"
            )
        if self.capturable and self.verify_every:
            raise ValueError(
                f"capturable=True with verify_every={self.verify_every!r}: the check reads values on the host, which a "
                "CUDA graph cannot. Leave verify_every=0, or capturable=False"
            )
        if self.capturable and self.state_dtype is not None:
            raise ValueError(
                f"capturable=True with state_dtype={self.state_dtype!r}: the count of steps that makes the random bits "
                "is on the host, where a CUDA graph would not see it move. Leave state_dtype=None, or capturable=False"
            )
        if self.capturable and self.fused is False:
            raise ValueError(
                "capturable=True with fused=False: only the fast kernels can be captured, leave fused=None"
            )

    @property
    def masked(self) -> bool:
        """Whether the masks change anything, so that they are counted."""
        return self.gamma < 1

    @property
    def with_norm(self) -> bool:
        """Whether a step needs the norm of the whole model's gradient before it updates any parameter."""
        return self.clip_norm is not None or self.skip_nonfinite

    @property
    def norm_first(self) -> bool:
        """Whether it needs it before it counts: a threshold must know the clipped gradient.

        With gamma=1 there is nothing else.
        """
        return self.with_norm and not (self.masked and (self.threshold == 0 or self.clip_norm is None))

    @property
    def reads_first(self) -> bool:
        """Whether a step must have read every gradient before it updates any parameter."""
        return (self.masked and self.sync == "exact") or self.with_norm

    @classmethod
    def of(cls, group: Mapping[str, Any], **others: Any) -> Self:
        """Those in a parameter group, and others that groups do not have. What an older group lacks has its default."""
        return cls(**{name: group[name] for name in IN_GROUPS if name in group}, **others)

    def in_groups(self) -> dict[str, Any]:
        """Those that parameter groups show, and checkpoints with them."""
        return {name: getattr(self, name) for name in IN_GROUPS}


class Options(TypedDict, total=False):
    """``FamilyOptions`` for type checkers, which cannot read it from there."""

    gamma: float
    lookahead: float
    alpha_max: float
    threshold: float
    alpha_warmup: int
    scope: str
    sync: str
    clip_norm: float | None
    skip_nonfinite: bool
    telemetry: bool
    sharding: str
    process_group: dist.ProcessGroup | None
    fused: bool | None
    capturable: bool
    maximize: bool
    verify_every: int
    state_dtype: str | None
    rounding_seed: int


NAMES = tuple(option.name for option in fields(FamilyOptions))
IN_GROUPS = tuple(name for name in NAMES if name not in ("sharding", "process_group"))
SHARED = tuple(name for name in IN_GROUPS if name != "fused")
"""Equal in every parameter group; the constructor's win over a checkpoint's."""

_CHECKS = {option.name: option.metadata["check"] for option in fields(FamilyOptions) if option.metadata}


def check_option(name: str, value: Any) -> Any:
    """One option of ``FamilyOptions`` by itself, its numbers as Python's own. Raises ValueError."""
    return _CHECKS[name](name, value) if name in _CHECKS else value


def check_shared(kind: str, options: FamilyOptions, group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where a group of an optimizer class ``kind`` contradicts an option of the whole optimizer."""
    for name in IN_GROUPS:
        ours = getattr(options, name)
        if group.get(name, ours) != ours:
            raise ValueError(
                f"{name}={group[name]!r} in {where} contradicts {name}={ours!r} of the optimizer: {name} holds for all "
                f"groups, so give it to {kind}(...) and leave it out of groups"
            )


def check_group(kind: str, group: dict[str, Any], hyperparameters: Iterable[str]) -> None:
    """Check every value of a parameter group of an optimizer class ``kind`` that any class of the family knows.

    Mutates ``group``: its numbers become Python's own. What the class alone knows of its ``hyperparameters`` is left to
    it. Raises ValueError.
    """
    for name in hyperparameters:
        group[name] = plain(name, group[name])
    for name in ("lr", "weight_decay"):
        group[name] = check_number(name, group[name], "it must be 0 or more", 0)
    group["lr_scale"] = check_number("lr_scale", group["lr_scale"], "it must be more than 0", math.ulp(0.0))
    for name in IN_GROUPS:
        if name in group:
            group[name] = check_option(name, group[name])
    for name in ("sharding", "process_group"):
        if name in group:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group: it holds for all groups, so give it to {kind}(...)"
            )


def refuse_lookahead(kind: str, group: Mapping[str, Any], *, looks_ahead: bool) -> None:
    """Raise ValueError where a group asks for a look-ahead that an optimizer class ``kind`` has not."""
    if group.get("lookahead") and not looks_ahead:
        raise ValueError(
            f"lookahead={group['lookahead']!r}: {kind} has none, AlphaAdam alone has (AlphaSGD has nesterov). Leave it "
            "out, or give 0"
        )


def refuse_unserved(kind: str, group: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise ValueError where a group asks for what torch's optimizers have and an optimizer class ``kind`` has not."""
    for name in (*UNCHANGING, *fixed):
        if name in group and not _changes_nothing(name, group[name], fixed):
            raise ValueError(f"{name}={group[name]!r}: {kind} has no such option, remove it")


def misspelt_keys(group: Mapping[str, Any], names: Iterable[str], known: Set[str]) -> dict[str, str]:
    """The keys of a parameter group that nobody reads and that look like an option: key -> the option's name.

    Schedulers and trainers keep keys of their own in groups (initial_lr, base_momentum, name, lr_mult). A key that
    has an option's name in it is one of those: nobody misspells a word by writing it right.
    """
    names = list(names)
    found = {}
    for key in group:
        if key in known:
            continue
        word = str(key).strip().lower().replace("-", "_")
        near = [word] if word in names else difflib.get_close_matches(word, names, n=1, cutoff=0.8)
        if word in OTHER_NAMES and OTHER_NAMES[word] in names:
            found[str(key)] = OTHER_NAMES[word]
        elif near and (near[0] not in word or word in names):
            found[str(key)] = near[0]
    return found
