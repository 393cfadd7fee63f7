"""The GPU kernels, in Triton: a list of shards is one launch, however many and however small they are.

A launch reads its tensors through a table of pointers. Each program takes up to ``CHUNK`` elements of one tensor, so no
bit depends on where an element lies. Counts are added up as integers, norms over fixed chunks in a fixed order. All
numbers come from device memory, in float64, and are rounded to the state's dtype where they are used: nothing here
waits for the device, and a CUDA graph may hold the whole step.

State is fp32 or fp64, gradients those or bf16 or fp16. Other lists, and directions that are not in this file, go to
the reference kernels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import rule
from ..rounding import Rounding
from ..tensors import has_memory
from . import reference
from .build import Unavailable

CHUNK = 2**16  # elements a program takes
BLOCK = 2**10  # of them at a time
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_STATE_TYPES = (torch.float32, torch.float64)
_ADAM, _LION, _SGD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _opposes(g, m, threshold, THRESHOLD: tl.constexpr):
    """rule.classify's conflict."""
    if THRESHOLD:
        against = tl.where(g > 0, m, -m)
        return (g != 0) & (against < -threshold * tl.abs(g))
    return ((g > 0) & (m < 0)) | ((g < 0) & (m > 0))


@triton.jit
def _lerp(a, b, weight):
    """a + weight (b - a) as torch's lerp computes it."""
    small = weight < 0.5
    return tl.fma(tl.where(small, weight, weight - 1) + tl.zeros_like(a), b - a, tl.where(small, a, b))


@triton.jit
def _divided(a, b, T: tl.constexpr):
    """Correctly rounded, as fp64 division is anyway."""
    return tl.div_rn(a, b) if tl.float32 == T else a / b


@triton.jit
def _root(a, T: tl.constexpr):
    return tl.sqrt_rn(a) if tl.float32 == T else tl.sqrt(a)


@triton.jit
def _pointer(table, row, tensors, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + row * tensors + tensor).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


# What the kernels read and write. Float64 where nothing is said; `tensors` is the length of a list.
#
#   work       int64 (programs, 2)     which tensor a program takes, and from which element on
#   table      int64 (lists, tensors)  addresses: row 0 the gradients, then for count the momenta, for update the
#                                      parameters and each moment
#   numels     int64 (tensors,)        elements of each tensor
#   scale      ()                      makes gradients true ones; read with SCALE
#   threshold  ()                      read with THRESHOLD
#   strengths  (tensors, 2)            f where a tensor agrees and where it conflicts, from Statistics.strengths
#   numbers    (tensors, COLUMNS)      decay, size; then for Adam the root of 1 - beta2^t, 1 - beta1, beta2, 1 - beta2,
#                                      eps; for Lion 1 - beta1, 1 - beta2; for SGD momentum. `decay` and `size` are
#                                      rule.decay_of and rule.size_of
#   counts     int64 (tensors, 2)      agree and conflict, added to; Statistics.add reads them
#   squares    (programs,)             the squared norm of what a program read; count adds them up by tensor


@triton.jit
def _count(
    work, table, numels, tensors, scale, threshold,  # read
    counts, squares,  # written
    G: tl.constexpr, T: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, NORMS: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, start = tl.load(work + 2 * program), tl.load(work + 2 * program + 1)
    numel = tl.load(numels + tensor)
    grads = _pointer(table, 0, tensors, tensor, G, ALIGNED)
    momenta = _pointer(table, 1, tensors, tensor, T, ALIGNED)
    bound = tl.load(threshold).to(T)
    evidence = tl.zeros([BLOCK], tl.int64)
    conflicts = tl.zeros([BLOCK], tl.int64)
    squared = tl.zeros([BLOCK], tl.float64)
    for at in range(start, tl.minimum(start + CHUNK, numel), BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < numel
        g = tl.load(grads + offsets, mask=inside, other=0.0).to(T)
        m = tl.load(momenta + offsets, mask=inside, other=0.0)
        if NORMS:
            squared += g.to(tl.float64) * g.to(tl.float64)
        if SCALE:
            g *= tl.load(scale).to(T)
        evidence += (g != 0).to(tl.int64)
        conflicts += _opposes(g, m, bound, THRESHOLD).to(tl.int64)
    conflict = tl.sum(conflicts)
    tl.atomic_add(counts + 2 * tensor, tl.sum(evidence) - conflict)
    tl.atomic_add(counts + 2 * tensor + 1, conflict)
    if NORMS:
        tl.store(squares + program, tl.sum(squared))


@triton.jit
def _update(
    work, table, numels, tensors, scale, threshold, strengths, strengths_stride, numbers,  # read
    counts,  # written, as the tensors in the table but the gradients
    DIRECTION: tl.constexpr, NESTEROV: tl.constexpr, COLUMNS: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, COUNTING: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, start = tl.load(work + 2 * program), tl.load(work + 2 * program + 1)
    numel = tl.load(numels + tensor)
    grads = _pointer(table, 0, tensors, tensor, G, ALIGNED)
    params = _pointer(table, 1, tensors, tensor, T, ALIGNED)
    firsts = _pointer(table, 2, tensors, tensor, T, ALIGNED)
    bound = tl.load(threshold).to(T)
    f_agree = tl.load(strengths + tensor * strengths_stride).to(T)
    f_conflict = tl.load(strengths + tensor * strengths_stride + 1).to(T)
    mine = numbers + tensor * COLUMNS
    decay, size = tl.load(mine).to(T), tl.load(mine + 1).to(T)
    evidence = tl.zeros([BLOCK], tl.int64)
    conflicts = tl.zeros([BLOCK], tl.int64)
    for at in range(start, tl.minimum(start + CHUNK, numel), BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < numel
        g = tl.load(grads + offsets, mask=inside, other=0.0).to(T)
        p = tl.load(params + offsets, mask=inside, other=0.0)
        m = tl.load(firsts + offsets, mask=inside, other=0.0)
        if SCALE:
            g *= tl.load(scale).to(T)
        against = _opposes(g, m, bound, THRESHOLD)
        f = tl.where(against, f_conflict, tl.where(g != 0, f_agree, tl.full([], 1.0, T)))
        if COUNTING:
            evidence += (g != 0).to(tl.int64)
            conflicts += against.to(tl.int64)
        p *= decay
        if DIRECTION == _ADAM:
            seconds = _pointer(table, 3, tensors, tensor, T, ALIGNED)
            root, keep = tl.load(mine + 2).to(T), tl.load(mine + 3).to(T)
            beta2, gain, eps = tl.load(mine + 4).to(T), tl.load(mine + 5).to(T), tl.load(mine + 6).to(T)
            v = tl.load(seconds + offsets, mask=inside, other=0.0)
            m = _lerp(m, g, keep)
            v = tl.fma(gain * g, g, v * beta2)
            p += _divided(size * (m * f), _divided(_root(v, T), root + tl.zeros_like(v), T) + eps, T)
            tl.store(seconds + offsets, v, mask=inside)
        elif DIRECTION == _LION:
            ahead, keep = tl.load(mine + 2).to(T), tl.load(mine + 3).to(T)
            between = _lerp(m, g, ahead)
            sign = (between > 0).to(T) - (between < 0).to(T)
            p = tl.fma(sign * f, size + tl.zeros_like(p), p)
            m = _lerp(m, g, keep)
        else:
            momentum = tl.load(mine + 2).to(T)
            m = m * momentum + g
            direction = tl.fma(m, momentum + tl.zeros_like(m), g) if NESTEROV else m
            p = tl.fma(direction * f, size + tl.zeros_like(p), p)
        tl.store(params + offsets, p, mask=inside)
        tl.store(firsts + offsets, m, mask=inside)
    if COUNTING:
        conflict = tl.sum(conflicts)
        tl.atomic_add(counts + 2 * tensor, tl.sum(evidence) - conflict)
        tl.atomic_add(counts + 2 * tensor + 1, conflict)


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
    if wide or not _serves(grads, momenta):
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
                G=_TYPES[grads[0].dtype], T=_TYPES[momenta[0].dtype], SCALE=scale is not None, THRESHOLD=threshold > 0,
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
    if kernel is None or rounding is not None or not _serves(grads, params, *moments):
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
    if launch.programs:
        with torch.cuda.device_of(counts):  # as in count
            _update[(launch.programs,)](
                launch.work, launch.table, launch.numels, len(params), _scalar(scale, device),
                _scalar(threshold, device), strengths, strengths.stride(0), numbers, counts,
                DIRECTION=which, NESTEROV=bool(hyperparameters.get("nesterov")), COLUMNS=numbers.shape[1],
                G=_TYPES[grads[0].dtype], T=_TYPES[params[0].dtype], SCALE=scale is not None, THRESHOLD=threshold > 0,
                COUNTING=counting, ALIGNED=launch.aligned, CHUNK=CHUNK, BLOCK=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *(tensor for tensors in moments for tensor in tensors)])
    return counts if counting else None


Column = Tensor | float | list[float]


def _adam(steps: Any, of: Mapping[str, Any]) -> list[Column]:
    (beta1, beta2), lr, decay = of["betas"], of["lr"], of["weight_decay"]
    constant: list[Column] = [1 - beta1, beta2, 1 - beta2, of["eps"]]
    if isinstance(steps, Tensor):  # capturable: what depends on t is computed on the device
        t, lr = steps.double(), rule.rate(lr)
        correction = 1 - beta1**t
        size = -(lr / (correction.to(lr.dtype) if isinstance(lr, Tensor) else correction))
        return [1 - lr * decay, size, (1 - beta2**t).sqrt(), *constant]
    roots: Column = [(1 - beta2**t) ** 0.5 for t in steps]
    return [rule.decay_of(lr, decay), rule.sizes_of(lr, beta1, steps), roots, *constant]


def _lion(steps: Any, of: Mapping[str, Any]) -> list[Column]:
    (beta1, beta2), lr = of["betas"], rule.rate(of["lr"])
    return [1 - lr * of["weight_decay"], -lr, 1 - beta1, 1 - beta2]


def _sgd(steps: Any, of: Mapping[str, Any]) -> list[Column]:
    lr = rule.rate(of["lr"])
    return [1 - lr * of["weight_decay"], -lr, of["momentum"]]


_KERNELS = {rule.adam_: (_ADAM, _adam), rule.lion_: (_LION, _lion), rule.sgd_: (_SGD, _sgd)}
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


def _serves(grads: Sequence[Tensor], *own: Sequence[Tensor]) -> bool:
    """All of one device, each list of one dtype that the kernels take, all tensors runs of memory in the same order.

    A tensor subclass may have no memory of its own.
    """
    if not grads:
        return False
    device, grad_type, state_type = grads[0].device, grads[0].dtype, own[0][0].dtype
    if grad_type not in _TYPES or state_type not in _STATE_TYPES:
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
