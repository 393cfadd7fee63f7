"""The reference kernels: rule.py over lists of local shards, for any device, dtype and direction.

A list holds one tensor per shard, all on one device. A gradient of another dtype than its moment is
converted to that first. Nothing here knows of ranks or reads a device value on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rule
from ..rounding import Rounding


def count(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    threshold: float,
    scale: Tensor | float | None,
    norms: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Agreeing and conflicting coordinates of each shard: int64 of shape (n, 2). Mutates nothing.

    Args:
        scale: a number or 0-dim tensor that makes ``grads`` true gradients: each is multiplied by it, the same float
            operation an unscaling in place would do. None: they are.
        norms: return the squared L2 norm of each gradient before scaling, too: float64 of shape (n,).
        wide: compute in fp32, as before an update that rounds; else in the moment's dtype.
    """
    rows = []
    for grad, momentum in zip(grads, momenta, strict=True):
        moment = momentum.float() if wide else momentum
        agree, conflict = rule.classify(_true(grad, scale, moment.dtype), moment, threshold)
        rows.append(torch.stack((agree.sum(), conflict.sum())))
    return _stacked(rows), squared_norms(grads, momenta, wide=wide) if norms else None


def squared_norms(grads: Sequence[Tensor], momenta: Sequence[Tensor], *, wide: bool = False) -> Tensor:
    """Squared L2 norm of each shard's gradient in the dtype of its moment, or fp32: float64 (n,). Mutates nothing."""
    norms = [
        _squared_norm(grad.to(torch.float32 if wide else momentum.dtype))
        for grad, momentum in zip(grads, momenta, strict=True)
    ]
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64, device="cpu")


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
    """One update of shards that share hyperparameters. Mutates params and moments.

    Args:
        direction: of rule.py or of its kind.
        moments: a list for each state tensor that the direction takes, the momentum that makes the masks first.
        strengths: float64 of shape (n, 2): f where each shard agrees and where it conflicts.
        scale: makes ``grads`` true gradients, as in :func:`count`.
        counting: return the counts of the masks used, as :func:`count` would have before the update.
        steps: t of each shard, this update counted, for a direction that takes it.
        hyperparameters: the direction's others, by name.
        rounding: compute in fp32 and round what is kept in bf16 by it.
        norms: return squared L2 norms too, float64 of shape (n, 2): of each gradient before scaling, and of what each
            parameter is afterwards minus what it was, rounding included.
    """
    rows, squared = [], []
    strengths = strengths.to(params[0].device) if params else strengths
    for i, (param, given, *own) in enumerate(zip(params, grads, *moments, strict=True)):
        grad = _true(given, scale, own[0].dtype if rounding is None else torch.float32)
        agree, conflict = rule.classify(grad, own[0].to(grad.dtype), threshold)
        f = rule.factor(agree, conflict, strengths[i, 0], strengths[i, 1], grad.dtype)
        step = {} if steps is None else {"step": steps[i]}
        before = param.clone() if norms else None
        if rounding is None:
            direction(param, grad, *own, f, **step, **hyperparameters)
        else:
            rule.rounded_(direction, param, grad, own, f, rounding, i, **step, **hyperparameters)
        if counting:
            rows.append(torch.stack((agree.sum(), conflict.sum())))
        if before is not None:
            squared.append(torch.stack((_squared_norm(given.to(grad.dtype)), _squared_norm(param.double() - before))))
    return _stacked(rows) if counting else None, _stacked(squared, torch.float64) if norms else None


def advance(steps: list[Tensor]) -> list[float]:
    """Count an update of every parameter in its step, float32 () on the CPU; t of each."""
    torch._foreach_add_(steps, 1.0)
    return [step.item() for step in steps]


def _stacked(rows: list[Tensor], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros((0, 2), dtype=dtype, device="cpu")


def _squared_norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def _true(grad: Tensor, scale: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """The true gradient in ``dtype``."""
    grad = grad.to(dtype)
    if scale is None:
        return grad
    return grad * (scale.to(grad.device, dtype) if isinstance(scale, Tensor) else scale)
