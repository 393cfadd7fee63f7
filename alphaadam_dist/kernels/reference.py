"""The reference kernels: rule.py over lists of local shards, the AdamW arithmetic in torch's foreach operations.

A list holds one tensor per shard, all on one device. Nothing here knows of ranks or reads a device value on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import rule


def count(
    grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], *, threshold: float, scale: Tensor | float | None
) -> Tensor:
    """Agreeing and conflicting coordinates of each shard: int64 of shape (n, 2). Mutates nothing.

    ``scale``, a number, a 0-dim tensor or None, makes ``grads`` true gradients where the threshold needs them: each is
    converted to its moment's dtype and multiplied by it, the same float operations an unscaling in place would do.
    """
    if not grads:
        return torch.zeros((0, 2), dtype=torch.int64)
    rows = []
    for grad, exp_avg in zip(grads, exp_avgs, strict=True):
        if isinstance(scale, Tensor):
            scale = scale.to(grad.device, exp_avg.dtype)  # as the update casts it
        true_grad = grad if scale is None else grad.to(exp_avg.dtype) * scale
        agree, conflict = rule.classify(true_grad, exp_avg, threshold)
        rows.append(torch.stack((agree.sum(), conflict.sum())))
    return torch.stack(rows)


def squared_norms(grads: Sequence[Tensor]) -> Tensor:
    """Squared L2 norm of each shard's gradient: float64 of shape (n,). Mutates nothing."""
    if not grads:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads])


def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    strengths: Tensor,
    threshold: float,
    steps: list[float],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    counting: bool,
) -> Tensor | None:
    """One AlphaAdam update of shards that share hyperparameters. Mutates params, exp_avgs and exp_avg_sqs.

    Args:
        strengths: float64 of shape (n, 2): f where each shard agrees and where it conflicts.
        steps: t of each shard, this update counted.
        counting: return the counts of the masks used, as :func:`count` would have before the update.
    """
    if not params:
        return torch.zeros((0, 2), dtype=torch.int64) if counting else None
    beta1, beta2 = betas
    masks = [rule.classify(g, m, threshold) for g, m in zip(grads, exp_avgs, strict=True)]
    factors = [
        rule.factor(agree, conflict, f[0], f[1], m.dtype)
        for (agree, conflict), f, m in zip(masks, strengths, exp_avgs, strict=True)
    ]

    # not _foreach_mul_ by a number: on the CPU it rounds the number to 16 bits where the tensors are
    decay = float(1 - lr * weight_decay)
    for param in params:
        param.mul_(decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    for exp_avg_sq in exp_avg_sqs:
        exp_avg_sq.mul_(beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denoms = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denoms, [(1 - beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denoms, eps)
    torch._foreach_mul_(factors, exp_avgs)
    torch._foreach_addcdiv_(params, factors, denoms, [float(-(lr / (1 - beta1**t))) for t in steps])

    if not counting:
        return None
    return torch.stack([torch.stack((agree.sum(), conflict.sum())) for agree, conflict in masks])
