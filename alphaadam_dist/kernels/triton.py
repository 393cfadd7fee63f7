"""The GPU kernels, in Triton: a list of shards is one launch, however many and however small they are.

A launch reads its tensors through a table of pointers. Each program takes a chunk of one tensor, so no bit of an update
depends on where an element lies. Counts are added up as integers, norms over chunks in a fixed order. All numbers come
from device memory, in float64, and are rounded to the state's dtype where they are used: nothing here waits for the
device, and a CUDA graph may hold the whole step.

State is fp32 or fp64, or bf16 that rounding.py rounds, gradients those or bf16 or fp16; a list of several dtypes is a
launch for each. A gradient that lies in memory in another order than its parameter is put in order in a copy. Other
tensors go to the reference kernels, each alone, and so do directions that are not in this file.
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
from ..tensors import has_memory, in_order
from . import device_tables, reference
from .build import Unavailable
from .device_tables import Table
from .reference import advance as advance
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
    grads: list[Tensor],
    momenta: Sequence[Tensor],
    *,
    threshold: float,
    scale: Tensor | float | None,
    norms: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`reference.count`, in one launch. What has to be put in order is replaced in the list of gradients."""
    options: dict[str, Any] = {"threshold": threshold, "scale": scale, "norms": norms, "wide": wide}
    parts, odd = _parts(grads, (), [momenta], wide)
    if not odd and len(parts) == 1:
        return _count_alike(grads, momenta, **options)
    rows: dict[int, tuple[Tensor, Tensor | None]] = {}
    for part in parts:
        counts, squared_norms = _count_alike([grads[i] for i in part], [momenta[i] for i in part], **options)
        for j, i in enumerate(part):
            rows[i] = counts[j], None if squared_norms is None else squared_norms[j]
    for i in odd:
        grads[i], again = in_order(grads[i], momenta[i])
        counts, squared_norms = (count if again else reference.count)([grads[i]], [momenta[i]], **options)
        rows[i] = counts[0], None if squared_norms is None else squared_norms[0]
    if not rows:
        return reference.count(grads, momenta, **options)
    ordered = [rows[i] for i in range(len(grads))]
    return (
        torch.stack([counts for counts, _ in ordered]),
        torch.stack([norm for _, norm in ordered if norm is not None]) if norms else None,
    )


def squared_norms(grads: list[Tensor], momenta: Sequence[Tensor], *, wide: bool = False) -> Tensor:
    """As :func:`reference.squared_norms`, without temporary tensors."""
    norms = count(grads, momenta, threshold=0.0, scale=None, norms=True, wide=wide)[1]
    assert norms is not None
    return norms


def _count_alike(
    grads: Sequence[Tensor], momenta: Sequence[Tensor], *, threshold: float, scale: Tensor | float | None, norms: bool,
    wide: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`count` of tensors that one launch takes."""
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
    return counts, _by_tensor(squares, programs_of) if norms else None


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
    norms: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`reference.update`, in one launch. ``steps`` may be a float32 tensor of shape (n,) on the device."""
    options: dict[str, Any] = {
        "threshold": threshold, "scale": scale, "counting": counting, "hyperparameters": hyperparameters,
        "norms": norms,
    }  # fmt: skip
    parts, odd = _parts(grads, params, moments, rounding is not None)
    if direction not in _KERNELS:
        parts, odd = [], list(range(len(grads)))
    if odd and isinstance(steps, Tensor):
        raise ValueError(
            f"capturable=True takes fp32 or fp64 parameters on one GPU and a direction of rule.py, and got "
            f"{sorted({str(params[i].dtype) for i in odd})}: leave capturable=False"
        )
    if not grads:
        return reference.update(
            direction, params, grads, moments, strengths=strengths, steps=None, rounding=rounding, **options
        )
    if not odd and len(parts) == 1:
        return _update_alike(
            direction, params, grads, moments, strengths=strengths, steps=steps, rounding=rounding, **options
        )
    rows: dict[int, Tensor] = {}
    squares: dict[int, Tensor] = {}
    for alone, part in [*((False, part) for part in parts), *((True, [i]) for i in odd)]:
        kernel: Callable[..., tuple[Tensor | None, Tensor | None]] = _update_alike
        some = [grads[i] for i in part]
        if alone:
            some[0], again = in_order(some[0], params[part[0]])
            kernel = update if again else reference.update
        counts, squared = kernel(
            direction, [params[i] for i in part], some, [[of[i] for i in part] for of in moments],
            strengths=torch.stack([strengths[i] for i in part]),
            steps=None if steps is None else torch.stack([steps[i] for i in part])
            if isinstance(steps, Tensor) else [steps[i] for i in part],
            rounding=None if rounding is None else rounding.of(part), **options,
        )  # fmt: skip
        rows.update(zip(part, () if counts is None else counts.unbind(), strict=counts is not None))
        squares.update(zip(part, () if squared is None else squared.unbind(), strict=squared is not None))
    return (
        torch.stack([rows[i] for i in range(len(grads))]) if counting else None,
        torch.stack([squares[i] for i in range(len(grads))]) if norms else None,
    )


def _update_alike(
    direction: Callable[..., None], params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], *,
    strengths: Tensor, threshold: float, scale: Tensor | float | None, counting: bool,
    steps: list[float] | Tensor | None, hyperparameters: Mapping[str, Any], rounding: Rounding | None, norms: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """:func:`update` of tensors that one launch takes."""
    which, columns_of = _KERNELS[direction]
    device = params[0].device
    work, table, programs_of = _tables([grads, params, *moments])
    numbers = _columns(columns_of(steps, hyperparameters), len(params), device)
    counts = torch.zeros((len(params) if counting else 0, 2), dtype=torch.int64, device=device)
    squares = torch.zeros((len(work) if norms else 0, 2), dtype=torch.float64, device=device)
    strengths = strengths.to(device)
    assert strengths.stride(1) == 1
    options: dict[str, Any] = {
        "DIRECTION": which, "NESTEROV": bool(hyperparameters.get("nesterov")),
        "G": _TYPES[grads[0].dtype], "SCALE": scale is not None, "THRESHOLD": threshold > 0, "COUNTING": counting,
        "NORMS": norms, "enable_fp_fusion": False,
    }  # fmt: skip
    P = _TYPES[params[0].dtype]
    if len(work):
        read = (
            work, table, len(params), _scalar(scale, device),
            _scalar(threshold, device), strengths, strengths.stride(0), numbers,
        )  # fmt: skip
        with torch.cuda.device_of(counts):  # as in count
            if rounding is None:
                _update[(len(work),)](*read, counts, squares, T=P, BLOCK=BLOCK, **options)
            else:
                places = device_tables.sent(np.array(rounding.numbers(), dtype=np.int64), device)
                _update_rounded[(len(work),)](*read, places, counts, squares, P=P, BLOCK=ROUNDED_BLOCK, **options)
    torch.autograd.graph.increment_version([*params, *(tensor for tensors in moments for tensor in tensors)])
    return counts if counting else None, _by_tensor(squares, programs_of) if norms else None


def _by_tensor(squares: Tensor, programs_of: Tensor) -> Tensor:
    """What the programs of each tensor found, added up in a fixed order."""
    # unsafe: else it reads the lengths on the host, to check them
    return torch.segment_reduce(squares, "sum", lengths=programs_of, unsafe=True)


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


def _parts(
    grads: Sequence[Tensor], params: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], wide: bool
) -> tuple[list[list[int]], list[int]]:
    """The places of what goes in one launch, for each launch, and of what goes in none. ``params`` may be left out."""
    parts: dict[tuple[torch.dtype, ...], list[int]] = {}
    odd = []
    for i, grad in enumerate(grads):
        own, kept = list(params[i : i + 1]), [of[i] for of in moments]
        if _serves(grad, own, kept, grads[0].device, wide):
            parts.setdefault(tuple(tensor.dtype for tensor in (grad, *own, *kept)), []).append(i)
        else:
            odd.append(i)
    return list(parts.values()), odd


def _serves(grad: Tensor, param: list[Tensor], moments: list[Tensor], device: torch.device, wide: bool) -> bool:
    """Of that device, of dtypes that a launch takes, and all runs of memory in the same order.

    A tensor subclass may have no memory of its own.
    """
    held = [*param, *moments]
    if not all(has_memory(tensor) and tensor.device == device for tensor in (grad, *held)):
        return False
    if grad.dtype not in _TYPES or grad.layout is not torch.strided or grad.is_neg():  # memory has the other sign then
        return False
    if wide:
        types = all(tensor.dtype == torch.bfloat16 for tensor in moments) and all(
            tensor.dtype in PARAMETER_DTYPES for tensor in param
        )
        return types and all(tensor.is_contiguous() and tensor.numel() == grad.numel() for tensor in (grad, *held))
    if moments[0].dtype not in _STATE_TYPES or any(tensor.dtype != moments[0].dtype for tensor in held):
        return False
    return all(
        tensor.numel() == grad.numel()
        and (
            (tensor.is_contiguous() and grad.is_contiguous())
            or (torch.ops.aten.is_non_overlapping_and_dense(tensor) and tensor.stride() == grad.stride())
        )
        for tensor in held
    )
