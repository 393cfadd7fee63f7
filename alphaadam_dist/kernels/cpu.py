"""The CPU kernels: one pass over memory for each of the two acts, in C++ (cpu.cpp).

They take fp32 and fp64 state with gradients in those or in 16 bits, and bf16 state that rounding.py rounds, of fp32 and
bf16 parameters. A gradient that lies in memory in another order than its parameter is put in order in a copy. Other
tensors go to the reference kernels, each alone, and so do directions that cpu.cpp does not have. Against those, counts
are equal, and parameters bitwise equal except where torch's own sqrt is not the correctly rounded one (MKL's, on AMD
processors, is off in the last bit for one number in five): there they are within four units in the last place of what
is added.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rule
from ..rounding import Rounding
from ..tensors import in_order
from . import build, reference

Unavailable = build.Unavailable
DTYPES = (torch.float32, torch.float64)  # of the state


_loading = threading.Lock()


def load() -> None:
    """Make the kernels ready, once for all threads. Raises Unavailable where they can't be compiled."""
    with _loading:
        _load()


@functools.cache
def _load() -> None:
    build.load()
    _describe()


@functools.cache
def _describe() -> None:
    """Tell torch.compile and FakeTensor the shapes that come out of the operators."""
    torch.library.register_fake("alphaadam::count", _fake_count)
    for operator, _ in _KERNELS.values():
        torch.library.register_fake(f"alphaadam::{operator}", _fake_update)


def _fake_count(
    grads: list[Tensor], momenta: list[Tensor], threshold: float, scale: float, norms: bool, wide: bool = False
) -> tuple[Tensor, Tensor, list[int]]:
    squared_norms = torch.empty(len(grads) if norms else 0, dtype=torch.float64, device="cpu")
    return torch.empty((len(grads), 2), dtype=torch.int64, device="cpu"), squared_norms, []


def _fake_update(tensors: list[Tensor], *_: Any, norms: bool = False, **__: Any) -> tuple[Tensor, Tensor, list[int]]:
    squared = torch.empty((len(tensors) if norms else 0, 2), dtype=torch.float64, device="cpu")
    return torch.empty((len(tensors), 2), dtype=torch.int64, device="cpu"), squared, []


def count(
    grads: list[Tensor],
    momenta: Sequence[Tensor],
    *,
    threshold: float,
    scale: Tensor | float | None,
    norms: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`reference.count`, reading each tensor once, also for the norms.

    A gradient that has to be put in order is replaced in the list, so that the update need not do it again.
    """
    if not grads:  # torch cannot tell where an operator without a tensor belongs
        return reference.count(grads, momenta, threshold=threshold, scale=scale, norms=norms, wide=wide)
    counts, squared_norms, odd = torch.ops.alphaadam.count(grads, momenta, threshold, _number(scale), norms, wide)
    for i in odd:
        grads[i], again = in_order(grads[i], momenta[i])
        kernel = count if again else reference.count
        one, norm = kernel([grads[i]], [momenta[i]], threshold=threshold, scale=scale, norms=norms, wide=wide)
        counts[i] = one[0]
        if norm is not None:
            squared_norms[i] = norm[0]
    return counts, squared_norms if norms else None


def squared_norms(grads: list[Tensor], momenta: Sequence[Tensor], *, wide: bool = False) -> Tensor:
    """As :func:`reference.squared_norms`, without temporary tensors."""
    norms = count(grads, momenta, threshold=0.0, scale=None, norms=True, wide=wide)[1]
    assert norms is not None
    return norms


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
    steps: list[float] | None,
    hyperparameters: Mapping[str, Any],
    rounding: Rounding | None = None,
    norms: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`reference.update`, in one pass and without temporary tensors."""
    if direction not in _KERNELS or not grads:
        return reference.update(
            direction, params, grads, moments, strengths=strengths, threshold=threshold, scale=scale,
            counting=counting, steps=steps, hyperparameters=hyperparameters, rounding=rounding, norms=norms,
        )  # fmt: skip
    operator, numbers = _KERNELS[direction]
    counts, squared, odd = getattr(torch.ops.alphaadam, operator)(
        params, grads, *moments, strengths.cpu(), threshold, _number(scale), *numbers(steps, hyperparameters),
        [] if rounding is None else rounding.numbers(), norms=norms,
    )  # fmt: skip
    for i in odd:
        grad, again = in_order(grads[i], params[i])
        one, norm = (update if again else reference.update)(
            direction, [params[i]], [grad], [[moment[i]] for moment in moments], strengths=strengths[i : i + 1],
            threshold=threshold, scale=scale, counting=counting, steps=None if steps is None else [steps[i]],
            hyperparameters=hyperparameters, rounding=None if rounding is None else rounding.of([i]), norms=norms,
        )  # fmt: skip
        if one is not None:
            counts[i] = one[0]
        if norm is not None:
            squared[i] = norm[0]
    return counts if counting else None, squared if norms else None


def advance(steps: list[Tensor]) -> list[float]:
    """As :func:`reference.advance`."""
    counted: list[float] = torch.ops.alphaadam.advance_(steps) if steps else []
    return counted


def _adam(steps: list[float] | None, of: Mapping[str, Any]) -> tuple[Any, ...]:
    assert steps is not None
    lr, (beta1, beta2), lookahead = of["lr"], of["betas"], of.get("lookahead", 0.0)
    decay, sizes = rule.decay_of(lr, of["weight_decay"]), rule.sizes_of(lr, beta1, steps, lookahead)
    return decay, sizes, steps, beta1, beta2, of["eps"], lookahead


def _lion(steps: list[float] | None, of: Mapping[str, Any]) -> tuple[Any, ...]:
    return rule.decay_of(of["lr"], of["weight_decay"]), rule.size_of(of["lr"]), *of["betas"]


def _sgd(steps: list[float] | None, of: Mapping[str, Any]) -> tuple[Any, ...]:
    return rule.decay_of(of["lr"], of["weight_decay"]), rule.size_of(of["lr"]), of["momentum"], of["nesterov"]


_KERNELS = {rule.adam_: ("adam_", _adam), rule.lion_: ("lion_", _lion), rule.sgd_: ("sgd_", _sgd)}
"""For each direction of rule.py the operator, and its numbers in the order that the operator takes them."""


def _number(scale: Tensor | float | None) -> float:
    return 1.0 if scale is None else float(scale)
