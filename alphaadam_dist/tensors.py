"""Which tensors are served, and where their values lie: kernels read memory, and a subclass may have none of its own.

A subclass of torch.Tensor that computes by itself (``__torch_dispatch__``) keeps its values in other tensors. Where one
of them holds every element, as in the subclasses that only change how a weight is multiplied, that one is updated.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_dtensor(tensor: object) -> "TypeIs[DTensor]":
    """Asked without importing DTensors, which takes a second: where nobody has, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, a view of it; a plain tensor itself; of other subclasses what their values lie in.

    Raises ValueError where the values of a subclass lie in no one tensor.
    """
    kind = type(tensor)
    if kind is Parameter or kind is Tensor:
        return tensor
    if is_dtensor(tensor):
        # not to_local(), which costs as much host time as the rest of the step where parameters are small
        return local(tensor._local_tensor)
    if isinstance(tensor, AsyncCollectiveTensor):
        return local(tensor.wait())
    return _memory_of(tensor)


def has_memory(tensor: Tensor) -> bool:
    """Its values lie in memory of its own."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def in_order(grad: Tensor, like: Tensor) -> tuple[Tensor, bool]:
    """A gradient whose elements lie in memory as those of ``like``, and whether it had to be copied for that."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(like)
    if not dense or grad.layout is not torch.strided or grad.stride() == like.stride() or grad.shape != like.shape:
        return grad, False
    return torch.empty_like(like, dtype=grad.dtype).copy_(grad), True


def _memory_of(tensor: Tensor) -> Tensor:
    kind = type(tensor)
    if isinstance(tensor, FakeTensor):  # for estimates: no kernel reads it, torch only follows the shapes
        return tensor
    if has_memory(tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(Tensor)
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    inner = [getattr(tensor, name) for name in names]
    whole = [one for one in inner if one.shape == tensor.shape and one.dtype == tensor.dtype]
    if len(whole) != 1 or any(one.numel() > 1 for one in inner if one is not whole[0]):
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} of dtype {tensor.dtype} is a tensor subclass whose values lie in "
            "no one tensor of that shape and dtype, so that nobody can tell what a step makes of them. Train a plain "
            "tensor and convert it after training, freeze it (requires_grad=False), or leave the parameter out"
        )
    return local(whole[0])


def check_kind(name: str, param: Tensor, optimizer: str) -> None:
    """Raise ValueError where ``param`` is of a kind that the optimizer class of that name does not take."""
    what = f"parameter {name!r}"
    if isinstance(param, UninitializedParameter):
        raise ValueError(f"{what} has no shape yet: call the lazy module once before building the optimizer")
    if param.dtype not in DTYPES:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{what} has dtype {param.dtype}: {optimizer} takes real floating point, {served}. Freeze it "
            "(requires_grad=False), leave it out, or convert it"
        )
    if param.layout is not torch.strided or param.is_nested:
        layout = "nested" if param.is_nested else param.layout
        raise ValueError(f"{what} has layout {layout}: {optimizer} takes dense tensors, such as param.to_dense()")
    try:
        held = local(param)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if held.layout is not torch.strided:
        raise ValueError(f"{what} is a DTensor over layout {held.layout}: {optimizer} takes dense tensors")
    if held.is_neg():
        raise ValueError(f"{what} is a lazy negation of other memory: give the module param.resolve_neg()")


def check_places(
    named: Sequence[tuple[str, Tensor]],
    states: Mapping[Tensor, Mapping[str, Any]],
    moments: Sequence[str],
    *,
    capturable: bool,
) -> None:
    """Raise ValueError where no step can be taken: no values, or moments that lie elsewhere or have other shapes."""
    devices = {param.device for _, param in named}
    for name, param in named:
        if param.device.type == "mps":
            raise ValueError(
                f"parameter {name!r} is on {param.device}: Apple's GPUs have no float64, in which the counts of the "
                "whole model and alpha are exact. Train on the CPU, model.to('cpu')"
            )
        if param.is_meta and len(devices) > 1:
            raise ValueError(
                f"parameter {name!r} is on meta, where it has no values, and others are not: give the module its "
                "values before building the optimizer, module.to_empty(device=...) and then a checkpoint"
            )
        for key in moments:
            held = states[param].get(key) if param in states else None
            if isinstance(held, Tensor) and (held.shape, held.device) != (param.shape, param.device):
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(param.shape)} on {param.device}, and its {key} "
                    f"{tuple(held.shape)} on {held.device}: it was changed in place after it had been stepped. Change "
                    f"optimizer.state[parameter][{key!r}] alike, or build the optimizer after the change"
                )
    if capturable and len(devices) > 1:
        raise ValueError(
            f"capturable=True with parameters on {', '.join(sorted(map(str, devices)))}: a CUDA graph holds the step "
            "of one device. Leave capturable=False"
        )
