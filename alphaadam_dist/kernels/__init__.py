"""The two passes over memory, as kernels: ``count`` reads (g, m), ``update`` writes the parameters and moments.

``reference.py`` is the rule over lists of tensors in torch operations, for any device and dtype. ``cpu.py`` and
``triton.py`` do the same in one pass over memory. All have the same two functions; :func:`choose` says whose to call.
"""

import functools
import importlib
import warnings
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, reference

SLOWER = "slower kernels, in torch operations, whose step takes 13 to 41 times as long as fused AdamW's on a CPU"
"""Measured with 1 and 32 Mi parameters: benchmarks/results/2026-11-24-step-time-cpu.json."""

SMALL = 2**20
"""Elements of a whole model below which the fast kernels are not chosen unasked: the reference is fast enough there,
needs no compiler and has AdamW's bits. A model has this size under every sharding, so sharding changes no choice."""


def choose(fused: bool | None, device: torch.device, elements: int) -> ModuleType:
    """The kernels for tensors of a device.

    Args:
        fused: False: the reference; True: the fast ones; None: the fast ones where they can be had and the whole model
            has ``SMALL`` elements or more.
        elements: of the whole model.

    Raises:
        ValueError: ``fused`` is True, and there are no fast kernels here.
    """
    if fused is False or (fused is None and elements < SMALL):
        return reference
    problem = _problem(device.type)
    if problem is None:
        return _of(device.type)
    if fused:
        raise ValueError(f"fused=True, but {problem}. Or leave fused=None to go on with the reference kernels")
    return reference


def unserved(param: Tensor, state_dtype: str | None) -> str | None:
    """What of a local parameter keeps it from the fast kernels, and the way out; None where they take it."""
    if not torch.ops.aten.is_non_overlapping_and_dense(param):
        return f"has strides {tuple(param.stride())}, with gaps in its memory: give the module param.contiguous()"
    if state_dtype is None and param.dtype not in cpu.DTYPES:
        return f"has dtype {param.dtype}, and they take it in fp32 and fp64: convert it, or give state_dtype='bfloat16'"
    if state_dtype is not None and not param.is_contiguous():
        return (
            f"has strides {tuple(param.stride())}, and with state_dtype={state_dtype!r} they take memory in the order "
            "of the elements: give the module param.contiguous()"
        )
    return None


@functools.cache
def _problem(device_type: str) -> str | None:
    """Why the fast kernels of a device can't be had, said once; None where they can."""
    if device_type not in ("cpu", "cuda"):
        return _warned(f"there are no fast kernels for {device_type}")
    if device_type == "cuda" and find_spec("triton") is None:
        return _warned("Triton is not installed: `pip install triton`")
    try:
        _of(device_type).load()
    except (ImportError, OSError, cpu.Unavailable) as error:
        return _warned(str(error))
    return None


def _of(device_type: str) -> ModuleType:
    return cpu if device_type == "cpu" else importlib.import_module(".triton", __name__)


def _warned(problem: str) -> str:
    warnings.warn(f"going on with {SLOWER}: {problem}", stacklevel=4)
    return problem
