"""The GPU kernels, in Triton: a list of shards is one launch, however many and however small they are.

A launch reads its tensors through a table of pointers. Each program takes a chunk of one tensor, so no bit of an update
depends on where an element lies. Counts are added up as integers, norms over chunks in a fixed order. All numbers come
from device memory, in float64, and are rounded to the state's dtype where they are used: nothing here waits for the
device, and a CUDA graph may hold the whole step.

State is fp32 or fp64, or bf16 that rounding.py rounds, gradients those or bf16 or fp16. Other lists, and directions
that are not in this file, go to the reference kernels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from .. import rule
from ..rounding import PARAMETER_DTYPES, Rounding
from ..tensors import has_memory
from . import device_tables, reference
from .build import Unavailable
from .device_tables import Table
from .reference import advance as advance
from .reference import squared_norms as squared_norms
from .triton_device import ADAM, COLUMNS, LION, SGD, _count, _update, _update_rounded

BLOCK = 2**9
"""Elements that a program takes at a time: four a thread, so that a thread reads 16 bytes of fp32 at once and the
registers (54 for Adam) leave room for 9 programs on a multiprocessor of an H100."""
ROUNDED_BLOCK = 2**10  # of _update_rounded: 8 a thread, one call of Philox
CHUNK = 2**16  # elements that a program takes at most
PROGRAMS = 2**11  # as many where tensors are smaller: an H100 runs about a thousand at a time
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
    work, table, programs_of = _tables([grads, momenta])
    counts = torch.zeros((len(grads), 2), dtype=torch.int64, device=device)
    squares = torch.zeros(len(work) if norms else 0, dtype=torch.float64, device=device)
    if len(work):
        with torch.cuda.device_of(counts):  # Triton launches on the current device, and a process may have several
            _count[(len(work),)](
                work, table, len(grads), _scalar(scale, device), _scalar(threshold, device),
                counts, squares,
                G=_TYPES[grads[0].dtype], M=_TYPES[momenta[0].dtype],
                T=tl.float32 if wide else _TYPES[momenta[0].dtype], SCALE=scale is not None, THRESHOLD=threshold > 0,
                NORMS=norms, BLOCK=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    # unsafe: else it reads the lengths on the host, to check them
    return counts, torch.segment_reduce(squares, "sum", lengths=programs_of, unsafe=True) if norms else None


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
    work, table, _ = _tables([grads, params, *moments])
    numbers = _columns(columns_of(steps, hyperparameters), len(params), device)
    counts = torch.zeros((len(params) if counting else 0, 2), dtype=torch.int64, device=device)
    strengths = strengths.to(device)
    assert strengths.stride(1) == 1
    options: dict[str, Any] = {
        "DIRECTION": which, "NESTEROV": bool(hyperparameters.get("nesterov")),
        "G": _TYPES[grads[0].dtype], "SCALE": scale is not None, "THRESHOLD": threshold > 0, "COUNTING": counting,
        "enable_fp_fusion": False,
    }  # fmt: skip
    P = _TYPES[params[0].dtype]
    if len(work):
        read = (
            work, table, len(params), _scalar(scale, device),
            _scalar(threshold, device), strengths, strengths.stride(0), numbers,
        )  # fmt: skip
        with torch.cuda.device_of(counts):  # as in count
            if rounding is None:
                _update[(len(work),)](*read, counts, T=P, BLOCK=BLOCK, **options)
            else:
                places = device_tables.sent(np.array(rounding.numbers(), dtype=np.int64), device)
                _update_rounded[(len(work),)](*read, places, counts, P=P, BLOCK=ROUNDED_BLOCK, **options)
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
    """The numbers of every tensor, float64 (rows, COLUMNS) on the device."""
    columns = columns + [0.0] * (COLUMNS.value - len(columns))
    if any(isinstance(column, Tensor) for column in columns):
        tensors = [_scalar(column, device) for column in columns if not isinstance(column, list)]
        assert len(tensors) == len(columns)
        return torch.stack([tensor.reshape(-1).expand(rows) for tensor in tensors], dim=1)
    table = np.array([column if isinstance(column, list) else [column] * rows for column in columns]).T.copy()
    if any(isinstance(column, list) for column in columns):
        return device_tables.sent(table, device)  # of this step
    return device_tables.kept(("numbers", rows, *columns), device, lambda: table).view(rows, -1)


def _tables(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """``work`` and ``table`` of a launch, and how many programs take each tensor, int64 (tensors,)."""
    device = lists[0][0].device
    numels = tuple(tensor.numel() for tensor in lists[0])
    pointers = [tensor.data_ptr() for tensors in lists for tensor in tensors]
    unaligned = frozenset(i % len(numels) for i, pointer in enumerate(pointers) if pointer % 16)

    def work() -> Table:
        sizes, chunk = np.array(numels, dtype=np.int64), _chunk(sum(numels))
        programs_of = -(-sizes // chunk)
        tensor = np.repeat(np.arange(len(sizes)), programs_of)
        start = (np.arange(len(tensor)) - np.repeat(np.cumsum(programs_of) - programs_of, programs_of)) * chunk
        stop = np.minimum(start + chunk, sizes[tensor])
        whole = np.where(np.isin(tensor, list(unaligned)), start, start + (stop - start) // BLOCK * BLOCK)
        return np.concatenate([programs_of, np.stack([tensor, start, whole, stop], axis=1).reshape(-1)])

    both = device_tables.kept(("work", unaligned, numels), device, work)
    table = device_tables.kept(("table", *pointers), device, lambda: np.array(pointers, dtype=np.int64))
    return both[len(numels) :].view(-1, 4), table, both[: len(numels)]


def _chunk(elements: int) -> int:
    """Elements that a program takes, a multiple of BLOCK. Of the sizes alone: norms have the same bits on every GPU."""
    return min(CHUNK, max(ROUNDED_BLOCK, 2 ** max(0, (elements // PROGRAMS).bit_length() - 1)))


def _scalar(value: Tensor | float | None, device: torch.device) -> Tensor:
    """A number in float64 on the device: the kernels are compiled for that."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    number = 1.0 if value is None else float(value)
    return device_tables.kept(("scalar", number), device, lambda: np.array(number)).view(())


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
