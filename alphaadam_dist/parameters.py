"""The parameters of an optimizer that no backend drives: their names, what they hold, and the layout that they make."""

import contextlib
import gc
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import model_ranks, one_model, options, replicas
from .kernels import consensus
from .layout import Layout, build_layout, statistics_device
from .persistence import Persistent
from .rounding import PARAMETER_DTYPES
from .shards import Shard, clean_names, fsdp1
from .shards.select import shards_of
from .tensors import check_kind, check_places, local

IDLE_STEPS = 3
"""Steps without any gradient after which that is said. Some programs step once before the first backward."""


def check(optimizer: Persistent, first_group: int = 0) -> None:
    """Raise ValueError or RuntimeError for a parameter, from a group on, that cannot be served."""
    for name, param in served(optimizer, first_group):
        _check_rounding(optimizer, name, param, _shards_of(optimizer, name, param))


def _check_rounding(optimizer: Persistent, name: str, param: Tensor, shards: Sequence[Shard]) -> None:
    """Raise ValueError for a parameter whose state cannot be rounded alike under any sharding."""
    state_dtype = optimizer._run.options.state_dtype
    if state_dtype is None:
        return
    if param.dtype not in PARAMETER_DTYPES:
        taken = " and ".join(str(dtype).removeprefix("torch.") for dtype in PARAMETER_DTYPES)
        raise ValueError(
            f"parameter {name!r} has dtype {param.dtype} and state_dtype={state_dtype!r}: that takes parameters in "
            f"{taken}. Convert it, with param.data = param.data.bfloat16() before the optimizer is built, or leave "
            "state_dtype=None"
        )
    if any(shard.positions is None for shard in shards):
        raise ValueError(
            f"parameter {name!r} is a shard of which nobody knows where it stands in the whole, and "
            f"state_dtype={state_dtype!r}: its random bits depend on that. Under FSDP1 give use_orig_params=False, or "
            "shard with FSDP2; of a DTensor split one dimension, or the first and one more, evenly; or leave "
            "state_dtype=None"
        )


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Around what makes many objects that stay: looking for garbage among all that Python holds would take longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collector()
def check_ranks(optimizer: Persistent) -> None:
    """Raise ValueError where it cannot be told which ranks the model is on."""
    held = [_shards_of(optimizer, *each) for each in served(optimizer)]
    model_ranks.reduce_group(optimizer.param_groups, held, optimizer.process_group)


def refuse_part_of_model(optimizer: Persistent) -> None:
    """Raise ValueError where the optimizer should know the whole model and knows only a part of it."""
    kind, option = type(optimizer).__name__, one_model.of_the_whole(optimizer._run.options)
    if option is None:
        return
    one_model.refuse_in_backward(kind, option)
    if sum(len(group["params"]) for group in optimizer.param_groups) == 1:
        ((name, param),) = named(optimizer.param_groups)
        if len(fsdp1.keys(param, name)) == 1:  # a FlatParameter is many
            one_model.refuse_one_per_parameter(kind, option, name, param)


def current_layout(optimizer: Persistent) -> Layout:
    """The layout of the parameters, built anew (collective) when they are not those it was built for."""
    layout = optimizer._run.layout
    params = [param for group in optimizer.param_groups for param in group["params"]]
    places = [id(p) for p in params], [p.shape for p in params], [p.device for p in params]
    if layout is not None and layout.places == places and not any(map(_to_be_stepped, layout.left_out)):
        return layout
    layout = _build(optimizer)
    layout.places, layout.left_out = places, tuple(param for param in params if param not in layout.segments)
    replicas.prove(layout, optimizer)
    return layout


@_without_collector()
def _build(optimizer: Persistent) -> Layout:
    options = optimizer._run.options
    pairs = served(optimizer)
    held = [_shards_of(optimizer, name, param) for name, param in pairs]
    check_places(pairs, optimizer.state, optimizer.moments, capturable=options.capturable)
    group = model_ranks.reduce_group(optimizer.param_groups, held, optimizer.process_group)
    taken = [param for _, param in pairs]
    layout = build_layout(
        taken,
        held,
        [local(param).numel() for param in taken],
        scope=options.scope,
        group=group,
        device=statistics_device(taken, group),
        names=[key for name, param in pairs for key in fsdp1.keys(param, name)],
    )
    consensus.settle(layout, options)
    return layout


def note_gradients(optimizer: Persistent, layout: Layout, some: bool) -> None:
    """A step has been taken, with ``some`` gradients here or with none. Warns, once, where there never was one.

    Synchronises in the step that would warn, where the model is reduced over a group: other ranks may have gradients.
    """
    run = optimizer._run
    if some or run.idle_steps is None:
        run.idle_steps = None
        return
    run.idle_steps += 1
    if run.idle_steps < IDLE_STEPS or run.options.capturable:  # a captured step may not read the device
        return
    run.idle_steps = None
    if layout.group is not None and optimizer._adopt().state()[0]:
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    trainable = sum(param.requires_grad for param in params)
    why = f"{trainable} are trainable, but no backward reached them" if trainable else "all of them are frozen"
    warnings.warn(
        f"this {type(optimizer).__name__} trains nothing: none of its {len(params)} parameters has had a gradient in "
        f"{IDLE_STEPS} steps ({why}). Build the optimizer from the model that is trained, after all that wraps it or "
        "adds parameters to it. With peft_config= a trainer adds its adapters after the optimizer was built: give it "
        "get_peft_model(model, peft_config) and an optimizer over that. This is said once",
        stacklevel=2,
    )


def refuse_scaled_rates(optimizer: Persistent) -> None:
    """Raise ValueError where the groups' rates are to each other as their lr_scale: somebody has multiplied already.

    The schedulers of timm, MAE and BEiT multiply by a key of this name. Rates that are tensors are not read. An
    lr_scale that somebody has put out of range since the group was made is a ValueError too.
    """
    groups = optimizer.param_groups
    for i, group in enumerate(groups):
        rule = "it must be more than 0, and a group whose lr is 0 stands still"
        options.check_number(f"param_groups[{i}]['lr_scale']", group["lr_scale"], rule, math.ulp(0.0))
    if all(group["lr_scale"] == groups[0]["lr_scale"] for group in groups):
        return
    if any(isinstance(group["lr"], Tensor) for group in groups):
        return
    first = groups[0]["lr"] / groups[0]["lr_scale"]
    if first and all(math.isclose(group["lr"] / group["lr_scale"], first) for group in groups):
        raise ValueError(
            f"the learning rates of the parameter groups ({_some([group['lr'] for group in groups])}) are to each "
            f"other as their lr_scale ({_some([group['lr_scale'] for group in groups])}), so a scheduler or script has "
            f"multiplied by it, and {type(optimizer).__name__} would do so again. Give every group the same lr, or "
            "set lr_scale=1.0 in every group once the other one has read it"
        )


def _some(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:3]) + (", ..." if len(values) > 3 else "")


def served(optimizer: Persistent, first_group: int = 0) -> list[tuple[str, Tensor]]:
    """As :func:`named`, without the frozen parameters of kinds that are not stepped, such as 4-bit weights.

    Raises ValueError where one of such a kind is not frozen, or has a gradient all the same.
    """
    found = []
    for name, param in named(optimizer.param_groups, first_group):
        try:
            check_kind(name, param, type(optimizer).__name__)
        except ValueError:
            if _to_be_stepped(param):
                raise
        else:
            found.append((name, param))
    return found


def _to_be_stepped(param: Tensor) -> bool:
    return param.requires_grad or param.grad is not None


def named(param_groups: Sequence[Mapping[str, Any]], first_group: int = 0) -> list[tuple[str, Tensor]]:
    """(name, parameter) of the groups from one on; "group.place" for those that were given without names."""
    names = [
        group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
        for i, group in enumerate(param_groups)
    ]
    clean = clean_names(name for of_group in names for name in of_group)
    return [
        (clean[name], param)
        for of_group, group in list(zip(names, param_groups, strict=True))[first_group:]
        for name, param in zip(of_group, group["params"], strict=True)
    ]


def _shards_of(optimizer: Persistent, name: str, param: Tensor) -> list[Shard]:
    has_names = "param_names" in optimizer.param_groups[0]
    return shards_of(param, name, named=has_names, sharding=optimizer.sharding, group=optimizer.process_group)
