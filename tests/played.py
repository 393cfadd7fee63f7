"""A second device, played on the CPU: "played:0", which holds values and computes, and refuses to meet CPU tensors.

For processes of their own: ``register`` makes it the accelerator of the process. torch's hooks for devices written in
Python are not stable; ``possible`` says whether this torch has them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

REGISTRATION = "torch.utils.backend_registration"


def possible() -> bool:
    return hasattr(importlib.import_module(REGISTRATION), "_setup_privateuseone_for_python_backend")


def register() -> None:
    importlib.import_module(REGISTRATION)._setup_privateuseone_for_python_backend("played")
    _kept.extend([torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")])
    _kept[0].fallback(_computed, "PrivateUse1")
    _kept[1].impl("_copy_from", _copied, "PrivateUse1")


def on(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the played device; where it is not contiguous, a copy to read only."""
    played: Any = torch._C._acc.create_empty_tensor(tuple(tensor.shape), tensor.dtype)
    played.held, played.read_only = tensor.contiguous(), not tensor.is_contiguous()
    return played


def off(tensor: Any) -> Tensor:
    """A tensor's memory as a tensor of the CPU."""
    return tensor.held if _is_played(tensor) else tensor


_kept: list[torch.library.Library] = []


def _is_played(tensor: Tensor) -> bool:
    return tensor.device.type == "played"


def _computed(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator, on the held tensors. What it gives back is the tensor that it was given, or a new one."""
    given: dict[int, Any] = {}

    def taken(tensor: Any) -> Tensor:
        if not _is_played(tensor):
            assert tensor.ndim == 0, f"{operator} meets tensors of {tensor.device} and of the played device"
            return tensor
        given[id(tensor.held)] = tensor
        return tensor.held

    names = [argument.name for argument in operator._schema.arguments]
    by_name = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [by_name.get(argument.name) for argument in operator._schema.arguments if argument.is_write]
    assert not any(getattr(tensor, "read_only", False) for tensor in written), f"{operator} writes to a copy"
    args, kwargs = tree_map_only(Tensor, taken, (args, kwargs))
    if operator is torch.ops.aten.as_strided.default:  # the place of a view within a view is known here alone
        held, size, stride, *start = args
        args = held, size, stride, held.storage_offset() + (start[0] if start and start[0] else 0)
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    made = operator(*args, **kwargs)
    for tensor in given.values():
        if tensor.shape != tensor.held.shape:  # the operator gave an empty tensor its size
            tensor.data = on(tensor.held)
    return tree_map_only(Tensor, lambda tensor: given[id(tensor)] if id(tensor) in given else on(tensor), made)


def _copied(source: Any, into: Any, non_blocking: bool = False) -> Any:
    """Between the devices and on this one."""
    assert not getattr(into, "read_only", False)
    off(into).copy_(off(source))
    return into
