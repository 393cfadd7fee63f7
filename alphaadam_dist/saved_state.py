"""Is a saved state one that an optimizer can go on with? All of it is checked before any of it is taken over.

A checkpoint may be another optimizer's, another model's, cut short or changed by hand, and torch loads whatever it is
given. The errors name the field, its value and what to do.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

from torch import Tensor

from . import options
from .rounding import FORMAT
from .shards import clean_names, fsdp1
from .tensors import is_dtensor, local

OTHER_MOMENTS = frozenset(
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "mu_product", "momentum_buffer", "square_avg", "grad_avg",
     "acc_delta", "sum", "prev", "step_size", "ax", "eta", "mu")
)  # fmt: skip
"""What torch's optimizers keep of a parameter. Other names, that a trainer left there, say nothing of the optimizer."""


def check_kind(state_dict: Any) -> None:
    """Raise ValueError where this is not the state of any optimizer."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if (
        not isinstance(groups, Sequence)
        or not all(isinstance(group, Mapping) for group in groups)
        or not all(isinstance(index, Hashable) for group in groups for index in _ids(group))
        or not isinstance(state_dict.get("state", {}), Mapping)
    ):
        raise ValueError(
            f"this {type(state_dict).__name__} is no state of an optimizer, which is a dict with 'state', a dict, and "
            "'param_groups', a list of dicts: give what state_dict() returned"
        )


def _ids(group: Mapping[str, Any]) -> Sequence[Any]:
    """What a saved group calls its parameters."""
    ids = group.get("params")
    return ids if isinstance(ids, Sequence) else ()


def check_groups(
    kind: str,
    state_dict: Mapping[str, Any],
    here: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    hyperparameters: Iterable[str],
    check_group: Callable[[dict[str, Any]], None],
) -> None:
    """Raise ValueError where an optimizer whose groups are ``here`` cannot go on with the groups of a state_dict.

    ``check_group`` is the constructor's check of a group; what a saved group lacks it gets from ``defaults``. Warns
    where that is an ``lr_scale`` that the optimizer was given.
    """
    groups = state_dict["param_groups"]
    if len(groups) != len(here):
        raise ValueError(
            f"the checkpoint has {len(groups)} parameter groups, this optimizer has {len(here)}: the groups must be "
            "those it was saved with (in a DeepSpeed config, adding or removing no_decay or groups changes them)"
        )
    for i, (group, ours) in enumerate(zip(groups, here, strict=True)):
        missing = [name for name in hyperparameters if name not in group]
        if missing:
            raise ValueError(
                f"parameter group {i} of the checkpoint has no {', '.join(missing)}: it is not whole, or another "
                f"optimizer's. Load another one, or put what {kind} should go on with into the group"
            )
        try:
            check_group({**defaults, **group})
        except ValueError as error:
            raise ValueError(f"parameter group {i} of the checkpoint: {error}") from None
        if "lr_scale" not in group and ours.get("lr_scale", 1) != 1:
            warnings.warn(
                f"parameter group {i} of the checkpoint has no lr_scale, so it goes on at 1 and not at the "
                f"{ours['lr_scale']!r} that this optimizer was given: set param_groups[{i}]['lr_scale'] after loading",
                stacklevel=4,
            )
    _check_of_the_model(groups, "alphaadam_state", statistics)
    _check_of_the_model(groups, "alphaadam_rounding", steps_of)


def _check_of_the_model(groups: Sequence[Mapping[str, Any]], name: str, read: Callable[[Any], Any]) -> None:
    """All groups have the same value of this name, or none has one, as those that AdamW wrote."""
    held = {i: read(group[name]) for i, group in enumerate(groups) if name in group}
    for i in range(len(groups)):
        if held and held.get(i) != next(iter(held.values())):
            first = next(iter(held))
            raise ValueError(
                f"{name} is {held[first]} in parameter group {first} of the checkpoint and "
                f"{held.get(i, 'missing')} in group {i}: it is the whole model's, so the groups are not of one run. "
                "Give all of them that of the run to go on with, or remove it from all to start the statistics anew"
            )


def statistics(value: Any) -> list[float]:
    """[T, alpha, A, C] as Python's floats. Raises ValueError where it cannot come from any run.

    A run that went on with a smaller alpha_max has the alpha of before until its next step.
    """
    try:
        if isinstance(value, (str, Mapping)):
            raise TypeError
        applied, alpha, agree, conflict = held = [_real(number) for number in value]
        counts = (applied, agree, conflict)
        possible = all(n >= 0 and n.is_integer() for n in counts) and 1 <= alpha < math.inf
    except (TypeError, ValueError):
        possible = False
    if not possible:
        raise ValueError(
            f"alphaadam_state={value!r} is no [T, alpha, A, C] of a run: give T, A and C as whole numbers of 0 or more "
            "and alpha as 1 or more, as state_dict() wrote them, or remove it from all groups to start the statistics "
            "anew"
        )
    return held


def steps_of(value: Any) -> int:
    """n of [format, n]. Raises ValueError where it cannot come from any run, or is of another format."""
    try:
        version, n = (int(number) if _real(number).is_integer() else -1 for number in value)
    except (TypeError, ValueError):
        version, n = -1, -1
    if version != FORMAT or n < 0:
        raise ValueError(
            f"alphaadam_rounding={value!r} is no [{FORMAT}, n] of a run, the format of the random bits that round and "
            "the number of steps: load it with the release that wrote it, or remove it from all groups to count anew"
        )
    return n


def _real(value: Any) -> float:
    number = options.plain("alphaadam_state", value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError
    return float(number)


def check_names(kind: str, state_dict: Mapping[str, Any], moments: Sequence[str], fixed: Mapping[str, Any]) -> None:
    """Raise ValueError where the groups or the state of some parameter are those of another optimizer.

    In a universal checkpoint of DeepSpeed the state is elsewhere, and there is nothing of it to check.
    """
    for group in state_dict["param_groups"]:
        for name, value in fixed.items():
            if group.get(name, value) != value:
                raise ValueError(
                    f"the checkpoint has {name}={group[name]!r}, which {kind} does not have: load it into the "
                    "optimizer that wrote it"
                )
    ids = {index for group in state_dict["param_groups"] for index in _ids(group)}
    for index, state in state_dict.get("state", {}).items():
        if index not in ids:
            continue  # what a trainer keeps for itself
        if not isinstance(state, Mapping):
            raise ValueError(f"parameter {index!r} of the checkpoint has {state!r} for a state: it is damaged")
        names = set(state) - {"step"}
        foreign = names & (OTHER_MOMENTS - set(moments))
        if names and (foreign or not set(moments) <= names):
            raise ValueError(
                f"the checkpoint has {', '.join(sorted(names))} of a parameter, where {kind} keeps "
                f"{', '.join(moments)}: it was written by another optimizer, or is not whole. Load it there, or begin "
                "without its state"
            )


def check_states(
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    moments: Sequence[str],
    *,
    counts_steps: bool,
    swapped: bool,
) -> None:
    """Raise ValueError where the saved state of a parameter does not fit it.

    Args:
        groups: the optimizer's own.
        counts_steps: the state has ``step``.
        swapped: a tensor without elements may stand for one that DeepSpeed keeps elsewhere.
    """
    if "state" not in state_dict:
        raise ValueError("the checkpoint has no 'state' with the moments of the parameters: it is not whole")
    check_order(groups, state_dict["param_groups"])
    for name, param, held in _pairs(groups, state_dict["param_groups"], state_dict["state"]):
        if not held or (set(held) == {"step"} and local(param).numel() == 0):
            continue  # never stepped, or this rank holds nothing of it
        if counts_steps:
            _check_step(name, held)
        for moment in moments:
            if held.get(moment) is None:
                raise ValueError(
                    f"the checkpoint has no {moment} of parameter {name}, but {', '.join(map(str, held))}: it is not "
                    "whole. Load another one, or remove the state of this parameter to begin it anew"
                )
            _check_moment(f"{moment} of parameter {name}", held[moment], param, swapped=swapped)


def check_order(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where the saved parameters are those of these groups in other places, for torch goes by places.

    Names that differ in more than the order say nothing: a model may be wrapped or called otherwise. So do those of a
    state that torch.distributed.checkpoint has put in order: it calls parameters by name, or FSDP1 numbers them anew.
    """
    by_name = any(isinstance(index, str) for group in saved_groups for index in _ids(group))
    if by_name or any(fsdp1.marked(param) for group in groups for param in group["params"]):
        return
    here, there = _names(groups), _names(saved_groups)
    if here == there or sorted(chain.from_iterable(here)) != sorted(chain.from_iterable(there)):
        return
    i = next(i for i, (ours, theirs) in enumerate(zip(here, there, strict=True)) if ours != theirs)
    pairs = zip_longest(here[i], there[i], fillvalue="no other")
    ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    raise ValueError(
        f"parameter group {i} of the checkpoint has {theirs} where this optimizer has {ours}: the same parameters in "
        "another order, so each would go on with what is another's. Give the optimizer its parameters, or "
        "the groups by name their entries, as they were when it was saved"
    )


def _names(groups: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The names in each group, where there are any, without what wrappers put into them."""
    named = [[str(name) for name in group.get("param_names") or ()] for group in groups]
    clean = clean_names(chain.from_iterable(named))
    return [[clean[name] for name in names] for names in named]


def _pairs(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """(name, parameter, its saved state) for every parameter."""
    seen = set()
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        here, ids = group["params"], _ids(saved)
        if len(ids) != len(here):
            raise ValueError(
                f"parameter group {i} of the checkpoint has {len(ids) or 'no'} parameters, that of this optimizer "
                f"{len(here)}: the groups must be those it was saved with"
            )
        names = group.get("param_names", ())
        if len(names) != len(here):  # none, or those of what DeepSpeed has made flats of
            names = [f"{i}.{j}" for j in range(len(here))]
        for name, param, index in zip(names, here, ids, strict=True):
            if index in seen:
                raise ValueError(f"parameter {index!r} of the checkpoint stands twice in its groups: it is damaged")
            seen.add(index)
            yield name, param, state.get(index, {})


def _check_step(name: str, held: Mapping[str, Any]) -> None:
    try:
        step = _real(held["step"])
        counted = step >= 0 and step.is_integer()
    except (KeyError, TypeError, ValueError):
        counted = False
    if not counted:
        raise ValueError(
            f"step={held.get('step')!r} of parameter {name} in the checkpoint: it must be the number of the "
            "parameter's updates, 0 or more. Load another checkpoint, or remove the state of this parameter"
        )


def _check_moment(what: str, value: Any, param: Tensor, *, swapped: bool) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} in the checkpoint is {kind}: it must be a tensor of real floating point")
    if not (swapped and 0 in (value.numel(), param.numel())) and not _fits(value, param):
        raise ValueError(
            f"{what} in the checkpoint is {_described(value)}, the parameter {_described(param)}: it is of another "
            "model, or sharded otherwise. Load it with torch.distributed.checkpoint.state_dict."
            "set_optimizer_state_dict, which reshards"
        )
    if what.startswith("exp_avg_sq ") and not value.is_meta and bool((local(value) < 0).any()):
        raise ValueError(f"{what} in the checkpoint is negative somewhere, which squares cannot be: it is damaged")


def _fits(value: Tensor, param: Tensor) -> bool:
    if not is_dtensor(value):
        return value.shape == local(param).shape
    return is_dtensor(param) and (value.shape, value.device_mesh, value.placements) == (
        param.shape, param.device_mesh, param.placements,
    )  # fmt: skip


def _described(tensor: Tensor) -> str:
    sharded = f" sharded as {tensor.placements}" if is_dtensor(tensor) else ""
    return f"of shape {tuple(tensor.shape)}{sharded}"


_WHAT_CHANGES = {
    "state_dtype": ": the moments were converted, to the nearest number where they lose places",
    "rounding_seed": ": other random bits round from here on",
}


def take_over(kind: str, groups: Iterable[dict[str, Any]], defaults: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Make loaded parameter groups those of an optimizer with these defaults. Mutates the groups.

    What the constructor was told for the whole optimizer wins over what the checkpoint says, with a warning.
    """
    changed: dict[str, Any] = {}
    for group in groups:
        for name in options.SHARED:
            if name in group and options.plain(name, group[name]) != defaults[name]:
                changed.setdefault(name, group[name])
            group[name] = defaults[name]
        group["fused"] = defaults["fused"]
        for name, value in defaults.items():
            # a list of its own: the optimizer sees by identity that somebody else put it there
            group.setdefault(name, list(value) if isinstance(value, list) else value)
        for name in keys:
            group[name] = options.plain(name, group[name])
    for name, value in changed.items():
        warnings.warn(
            f"the checkpoint was written with {name}={value!r}; going on with {name}={defaults[name]!r} as given to "
            f"{kind}(...){_WHAT_CHANGES.get(name, '')}",
            stacklevel=4,
        )
