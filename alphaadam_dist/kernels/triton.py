"""The GPU kernels, in Triton: a list of shards is one launch, however many and however small they are.

A launch reads its tensors through a table of pointers. Each program takes up to ``CHUNK`` elements of one tensor, so no
bit depends on where an element lies. Counts are added up as integers, norms over fixed chunks in a fixed order. All
numbers come from device memory, in float64, and are rounded to the state's dtype where they are used: nothing here
waits for the device, and a CUDA graph may hold the whole step.

State is fp32 or fp64, or bf16 that rounding.py rounds, gradients those or bf16 or fp16. Other lists, and directions
that are not in this file, go to the reference kernels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import rule
from ..rounding import PARAMETER_DTYPES, Rounding
from ..tensors import has_memory
from . import reference
from .build import Unavailable
from .reference import advance as advance
from .reference import squared_norms as squared_norms
from .triton_device import ADAM, LION, SGD, _count, _update, _update_rounded

CHUNK = 2**16  # elements a program takes
BLOCK = 2**10  # of them at a time
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_STATE_TYPES = (torch.float32, torch.float64)


@functools.cache
def load() -> None:
    """Launch a kernel, to learn whether Triton can compile here.

    Raises:
        Unavailable: no compiler for what it launches with, no cache folder to write to, a GPU that it does not know.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    try:
        one = torch.ones(1, device="cuda")
        count([one], [one], threshold=0.0, scale=None)
    except Exception as error:  # Triton raises whatever the compiler, the driver or the file system gave it
        raise Unavailable(
            f"Triton cannot compile kernels here ({type(error).__name__}: {error}): install gcc, and set "
            "TRITON_CACHE_DIR to a folder of your own where the home folder cannot be written to"
        ) from error


def count(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    threshold: float,
    scale: Tensor | float | None,
    norms: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`reference.count`, in one launch."""
    if not _serves(grads, momenta, types=(torch.bfloat16,) if wide else _STATE_TYPES):
        return reference.count(grads, momenta, threshold=threshold, scale=scale, norms=norms, wide=wide)
    device = grads[0].device
    launch = _launch([grads, momenta])
    counts = torch.zeros((len(grads), 2), dtype=torch.int64, device=device)
    squares = torch.zeros(launch.programs if norms else 0, dtype=torch.float64, device=device)
    if launch.programs:
        with torch.cuda.device_of(counts):  # Triton launches on the current device, and a process may have several
            _count[(launch.programs,)](
                launch.work, launch.table, launch.numels, len(grads), _scalar(scale, device),
                _scalar(threshold, device), counts, squares,
                G=_TYPES[grads[0].dtype], M=_TYPES[momenta[0].dtype],
                T=tl.float32 if wide else _TYPES[momenta[0].dtype], SCALE=scale is not None, THRESHOLD=threshold > 0,
                NORMS=norms, ALIGNED=launch.aligned, CHUNK=CHUNK, BLOCK=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    return counts, torch.segment_reduce(squares, "sum", lengths=launch.programs_of) if norms else None


def update(
    direction: Callable[..., None],
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],
    *,
    strengths: Tensor,
    threshold: float,
    scale: Tensor | float | None,
    counting: bool,
    steps: list[float] | Tensor | None,
    hyperparameters: Mapping[str, Any],
    rounding: Rounding | None = None,
) -> Tensor | None:
    """As :func:`reference.update`, in one launch. ``steps`` may be a float32 tensor of shape (n,) on the device."""
    kernel = _KERNELS.get(direction)
    if kernel is None or not _serves_update(grads, params, moments, rounding):
        if isinstance(steps, Tensor):
            raise ValueError(
                f"capturable=True takes fp32 or fp64 parameters on one GPU and a direction of rule.py, and got "
                f"{sorted({str(param.dtype) for param in params})}: leave capturable=False"
            )
        return reference.update(
            direction, params, grads, moments, strengths=strengths, threshold=threshold, scale=scale,
            counting=counting, steps=steps, hyperparameters=hyperparameters, rounding=rounding,
        )  # fmt: skip
    which, columns_of = kernel
    device = params[0].device
    launch = _launch([grads, params, *moments])
    numbers = _columns(columns_of(steps, hyperparameters), len(params), device)
    counts = torch.zeros((len(params) if counting else 0, 2), dtype=torch.int64, device=device)
    strengths = strengths.to(device)
    assert strengths.stride(1) == 1
    options: dict[str, Any] = {
        "DIRECTION": which, "NESTEROV": bool(hyperparameters.get("nesterov")), "COLUMNS": numbers.shape[1],
        "G": _TYPES[grads[0].dtype], "SCALE": scale is not None, "THRESHOLD": threshold > 0, "COUNTING": counting,
        "ALIGNED": launch.aligned, "CHUNK": CHUNK, "BLOCK": BLOCK, "enable_fp_fusion": False,
    }  # fmt: skip
    if launch.programs:
        read = (
            launch.work, launch.table, launch.numels, len(params), _scalar(scale, device), _scalar(threshold, device),
            strengths, strengths.stride(0), numbers,
        )  # fmt: skip
        with torch.cuda.device_of(counts):  # as in count
            if rounding is None:
                _update[(launch.programs,)](*read, counts, T=_TYPES[params[0].dtype], **options)
            else:
                places = _sent(torch.tensor(rounding.numbers(), dtype=torch.int64, device="cpu"), device)
                _update_rounded[(launch.programs,)](*read, places, counts, P=_TYPES[params[0].dtype], **options)
    torch.autograd.graph.increment_version([*params, *(tensor for tensors in moments for tensor in tensors)])
    return counts if counting else None


Column = Tensor | float | list[float]


def _adam(steps: Any, of: Mapping[str, Any]) -> list[Column]:
    (beta1, beta2), lr, decay = of["betas"], of["lr"], of["weight_decay"]
    lookahead = of.get("lookahead", 0.0)
    constant: list[Column] = [1 - beta1, beta2, 1 - beta2, of["eps"]]
    if isinstance(steps, Tensor):  # capturable: what depends on t is computed on the device
        t, lr = steps.double(), rule.rate(lr)
        correction = 1 - beta1**t
        divisor = correction * (1 + lookahead)
        size = -(lr / (divisor.to(lr.dtype) if isinstance(lr, Tensor) else divisor))
        return [1 - lr * decay, size, (1 - beta2**t).sqrt(), *constant, lookahead * correction]
    roots: Column = [(1 - beta2**t) ** 0.5 for t in steps]
    ahead: Column = [lookahead * (1 - beta1**t) for t in steps]
    return [rule.decay_of(lr, decay), rule.sizes_of(lr, beta1, steps, lookahead), roots, *constant, ahead]


def _lion(steps: Any, of: Mapping[str, Any]) -> list[Column]:
    (beta1, beta2), lr = of["betas"], rule.rate(of["lr"])
    return [1 - lr * of["weight_decay"], -lr, 1 - beta1, 1 - beta2]


def _sgd(steps: Any, of: Mapping[str, Any]) -> list[Column]:
    lr = rule.rate(of["lr"])
    return [1 - lr * of["weight_decay"], -lr, of["momentum"]]


_KERNELS = {rule.adam_: (ADAM, _adam), rule.lion_: (LION, _lion), rule.sgd_: (SGD, _sgd)}
"""For each direction of rule.py what the kernel calls it, and the columns of the numbers that it reads."""


def _columns(columns: list[Column], rows: int, device: torch.device) -> Tensor:
    """The numbers of every tensor, float64 (rows, columns) on the device."""
    if any(isinstance(column, Tensor) for column in columns):
        tensors = [_scalar(column, device).double() for column in columns if not isinstance(column, list)]
        assert len(tensors) == len(columns)
        return torch.stack([tensor.reshape(-1).expand(rows) for tensor in tensors], dim=1)
    by_column = [column if isinstance(column, list) else [column] * rows for column in columns]
    return _sent(torch.tensor(by_column, dtype=torch.float64, device="cpu").t().contiguous(), device)


@dataclass(frozen=True)
class _Launch:
    """What a launch needs to know of its tensors."""

    programs: int
    aligned: bool  # every tensor begins at a multiple of 16 bytes
    work: Tensor
    table: Tensor
    numels: Tensor
    programs_of: Tensor  # int64 (tensors,): how many programs take each tensor


_launches: dict[tuple[int, ...], _Launch] = {}


def _launch(lists: Sequence[Sequence[Tensor]]) -> _Launch:
    """Made once for each set of addresses."""
    pointers = [tensor.data_ptr() for tensors in lists for tensor in tensors]
    numels = [tensor.numel() for tensor in lists[0]]
    key = (len(lists), *pointers, *numels)
    if key not in _launches:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and gradients lie elsewhere than in the steps before it: take a step "
                "before the capture and keep the gradients, with zero_grad(set_to_none=False)"
            )
        if len(_launches) >= 64:  # gradients that are freed between steps come to lie elsewhere
            _launches.clear()
        device = lists[0][0].device
        rows = [(i, start) for i, numel in enumerate(numels) for start in range(0, numel, CHUNK)]
        _launches[key] = _Launch(
            programs=len(rows),
            aligned=all(pointer % 16 == 0 for pointer in pointers),
            work=_sent(torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 2), device),
            table=_sent(torch.tensor(pointers, dtype=torch.int64, device="cpu").view(len(lists), -1), device),
            numels=_sent(torch.tensor(numels, dtype=torch.int64, device="cpu"), device),
            programs_of=_sent(
                torch.tensor([-(-numel // CHUNK) for numel in numels], dtype=torch.int64, device="cpu"), device
            ),
        )
    return _launches[key]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else tensor


def _scalar(value: Tensor | float | None, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), 1.0 if value is None else value, dtype=torch.float64, device=device)


def _serves_update(
    grads: Sequence[Tensor], params: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], rounding: Rounding | None
) -> bool:
    if rounding is None:
        return _serves(grads, params, *moments)
    in_rows = all(tensor.is_contiguous() for tensors in (grads, params, *moments) for tensor in tensors)
    return (
        in_rows and _serves(grads, params, types=PARAMETER_DTYPES) and _serves(grads, *moments, types=(torch.bfloat16,))
    )


def _serves(grads: Sequence[Tensor], *own: Sequence[Tensor], types: Sequence[torch.dtype] = _STATE_TYPES) -> bool:
    """All of one device, each list of one dtype that the kernels take, all tensors runs of memory in the same order.

    A tensor subclass may have no memory of its own.
    """
    if not grads:
        return False
    device, grad_type, state_type = grads[0].device, grads[0].dtype, own[0][0].dtype
    if grad_type not in _TYPES or state_type not in types:
        return False
    if not all(has_memory(tensor) for tensors in (grads, *own) for tensor in tensors):
        return False
    for grad, *tensors in zip(grads, *own, strict=True):
        if grad.dtype != grad_type or grad.device != device or grad.is_neg():  # memory has the other sign then
            return False
        for tensor in tensors:
            if tensor.dtype != state_type or tensor.device != device or tensor.numel() != grad.numel():
                return False
            if not (tensor.is_contiguous() and grad.is_contiguous()) and not (
                torch.ops.aten.is_non_overlapping_and_dense(tensor) and tensor.stride() == grad.stride()
            ):
                return False
    return True
