"""The reference kernels: rule.py over lists of local shards, for any device, dtype and direction.

A list holds one tensor per shard, all on one device. Nothing here knows of ranks or reads a device value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rule


def count(
    grads: Sequence[Tensor], momenta: Sequence[Tensor], *, threshold: float, scale: Tensor | float | None
) -> Tensor:
    """Agreeing and conflicting coordinates of each shard: int64 of shape (n, 2). Mutates nothing.

    ``scale``, a number, a 0-dim tensor or None, makes ``grads`` true gradients where the threshold needs them: each is
    converted to its moment's dtype and multiplied by it, the same float operations an unscaling in place would do.
    """
    if not grads:
        return torch.zeros((0, 2), dtype=torch.int64)
    rows = []
    for grad, momentum in zip(grads, momenta, strict=True):
        if isinstance(scale, Tensor):
            scale = scale.to(grad.device, momentum.dtype)  # as the update casts it
        true_grad = grad if scale is None else grad.to(momentum.dtype) * scale
        agree, conflict = rule.classify(true_grad, momentum, threshold)
        rows.append(torch.stack((agree.sum(), conflict.sum())))
    return torch.stack(rows)


def squared_norms(grads: Sequence[Tensor]) -> Tensor:
    """Squared L2 norm of each shard's gradient: float64 of shape (n,). Mutates nothing."""
    if not grads:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads])


def update(
    direction: Callable[..., None],
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],
    *,
    strengths: Tensor,
    threshold: float,
    counting: bool,
    steps: list[float] | None,
    hyperparameters: Mapping[str, Any],
) -> Tensor | None:
    """One update of shards that share hyperparameters. Mutates params and moments.

    Args:
        direction: of rule.py or of its kind.
        moments: a list for each state tensor that the direction takes, the momentum that makes the masks first.
        strengths: float64 of shape (n, 2): f where each shard agrees and where it conflicts.
        counting: return the counts of the masks used, as :func:`count` would have before the update.
        steps: t of each shard, this update counted, for a direction that takes it.
        hyperparameters: the direction's others, by name.
    """
    rows = []
    for i, (param, grad, *own) in enumerate(zip(params, grads, *moments, strict=True)):
        agree, conflict = rule.classify(grad, own[0], threshold)
        f = rule.factor(agree, conflict, strengths[i, 0], strengths[i, 1], grad.dtype)
        step = {} if steps is None else {"step": steps[i]}
        direction(param, grad, *own, f, **step, **hyperparameters)
        if counting:
            rows.append(torch.stack((agree.sum(), conflict.sum())))
    if not counting:
        return None
    return torch.stack(rows) if rows else torch.zeros((0, 2), dtype=torch.int64)
