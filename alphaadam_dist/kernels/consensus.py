"""All ranks of a model take the same kernels: two kinds differ in the last bit, and replicas would drift apart.

Where a model is reduced over a group its ranks ask each other when the layout is built. Replicas of plain tensors send
nothing to each other in a step, and an optimizer may live on one rank only, so there a rank that has no fast kernels
says so in the store through which the ranks first met, when its optimizer is built. The others look there, without
waiting, when they build their layout: under DistributedDataParallel that comes after a backward in which all took part.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kernels
from ..handshake import first_to_say, stop_together
from ..layout import Layout, statistics_device
from ..options import FamilyOptions
from ..tensors import local

SAID = "alphaadam/no fast kernels"
WHAT = "which kernels can all ranks have?"


def fused(options: FamilyOptions, layout: Layout | None = None) -> bool | None:
    """The option ``fused`` as :func:`kernels.choose` takes it, after what the ranks of a layout agreed on."""
    chosen = True if options.capturable else options.fused
    return False if chosen is None and layout is not None and layout.reference else chosen


def choose(options: FamilyOptions, layout: Layout, device: torch.device) -> ModuleType:
    """The kernels for tensors of a device, after what the ranks of the layout agreed on."""
    return kernels.choose(fused(options, layout), device, layout.numel)


def settle(layout: Layout, options: FamilyOptions, replicas: dist.ProcessGroup | None = None) -> None:
    """Set ``layout.reference``. Collective where the layout has a group, with a warning on ranks that need not do so.

    Args:
        options: the optimizer's.
        replicas: a group to ask where the layout has none, if every rank of it calls this.

    Raises:
        ValueError: on all ranks of the group, where one has ``fused=True`` and no fast kernels, or a parameter that
            they do not take.
    """
    option = fused(options)
    lack = _lack(option, layout.params, layout.numel)
    refused = _refusal(options, layout, lack) if option else None
    group = layout.group or replicas
    told = None
    if group is None:
        if refused:
            raise ValueError(refused)
        if option is None and layout.numel >= kernels.SMALL and _several():
            told = _said()
    else:
        device = layout.device if layout.group is not None else statistics_device(layout.params, group)
        stop_together(refused, group, device, WHAT)
        told = first_to_say("it was built with fused=False" if option is False else lack, group, device, WHAT)
    layout.reference = told is not None and option is None and layout.numel >= kernels.SMALL
    if layout.reference and told is not None and lack is None:
        warnings.warn(
            f"all ranks go on with {kernels.SLOWER}, as rank {told[0]} has no others: {told[1]}",
            stacklevel=2,
        )


def taken(options: FamilyOptions, layout: Layout) -> str:
    """The kernels that a rank takes for its parameters: "fast" or "reference"."""
    option = fused(options, layout)
    small = option is None and layout.numel < kernels.SMALL
    return "reference" if option is False or small or _lack(option, layout.params, layout.numel) else "fast"


def say(options: FamilyOptions, params_of: Callable[[], Sequence[Tensor]]) -> None:
    """Tell ranks of no common group, before any of them steps, that this one has no fast kernels. Waits for nobody."""
    if fused(options) is not None or not _several():
        return
    params = params_of()
    if torch.accelerator.is_available() and any(param.device.type == "cpu" for param in params):
        return  # the model may move to it before it steps
    lack = _lack(None, params, sum(param.numel() for param in params))
    if lack is not None and _said() is None:
        with contextlib.suppress(RuntimeError, AttributeError):  # as in _said
            dist.distributed_c10d._get_default_store().set(SAID, f"{dist.get_rank()} {lack}")


def _refusal(options: FamilyOptions, layout: Layout, lack: str | None) -> str | None:
    """Why ``fused=True`` cannot be kept to on this rank, and the way out; None where it can."""
    if lack is not None:
        return f"fused=True, but {lack}. Or leave fused=None to go on with the reference kernels"
    option = "capturable=True" if options.capturable else "fused=True"
    for shard in layout.shards:
        why = kernels.unserved(local(shard.param), options.state_dtype)
        if why is not None:
            leave = "capturable=False" if options.capturable else "fused=None"
            return (
                f"{option}, but parameter {shard.key!r} {why}. Or leave {leave}: it alone then goes to the reference "
                "kernels"
            )
    return None


def _said() -> tuple[int, str] | None:
    """The rank that has no fast kernels, and why, if one has said so."""
    store = dist.distributed_c10d._get_default_store()
    try:
        rank, _, why = store.get(SAID).decode().partition(" ") if store.check([SAID]) else ("", "", "")
    except (RuntimeError, AttributeError):  # the store is gone, or the backend has none: each rank chooses for itself
        return None
    return (int(rank), why) if rank else None


def _lack(option: bool | None, params: Iterable[Tensor], elements: int) -> str | None:
    """Why this rank cannot have the fast kernels that it would choose; None where it can, or chooses none."""
    if option is False or (option is None and elements < kernels.SMALL):
        return None
    kinds = {param.device.type for param in params if param.numel()} - {"meta"}
    return next(filter(None, (kernels._problem(kind) for kind in sorted(kinds))), None)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
