"""The algorithm, on plain tensors. Everything else in this package is a faster or sharded way to do this.

AlphaAdam (Chang, Li, Yuan, arXiv 2501.18094) puts a question to a momentum optimizer, at every coordinate: do the
momentum collected so far and the new gradient point the same way? Where they do, it steps; where they don't, it holds
back; and a factor alpha makes up on the first kind for what was held back on the second. The paper gives this frame,
mostly for AdamW, and leaves the details open; what follows is this library's definition.

With g the true gradient (unscaled, clipped, negated first to maximize) and m the momentum BEFORE the step:

    evidence   g != 0                                 NaN is evidence
    conflict   evidence and m * g < -threshold * g^2  at threshold 0: the signs are opposite
    agree      evidence and not conflict              no history (m = 0) is no conflict
    neutral    no evidence                            an embedding row that saw no token, the padding of a partition

    A, C  = number of agreeing and of conflicting coordinates of the scope: the whole model, or one parameter
    alpha = min(alpha_max, 1 + (1 - gamma) * C / A)   1 where A = 0
    r     = min(1, T / alpha_warmup)                  1 without warm-up; T counts this step
    f     = 1 + r (alpha - 1) where agree,  1 - r (1 - gamma) where conflict,  1 where neutral

    p *= 1 - lr * weight_decay                        decoupled, never masked; lr is the group's, times its lr_scale
    p -= lr * f * d                                   d is the direction of the optimizer, which updates its moments:

    AdamW   m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
            d = m^ / (sqrt(v) / sqrt(1 - beta2^t) + eps),  m^ = m / (1 - beta1^t);  with lookahead = c
            d = (m^ + c g) / (1 + c) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    Lion    d = sign(m + (1 - beta1) (g - m));  then  m += (1 - beta2) (g - m)
    SGD     m = momentum * m + g;  d = m, or with nesterov  g + momentum * m

What follows from it, each a test: the mean of f over the evidence is 1 (while alpha_max is not met), so the
learning rate carries over. Without conflict, with gamma = 1, and on the first step it is torch.optim.AdamW or SGD bit
for bit (but for look-ahead). With gamma = 1 every f is 1, so nothing is counted: alpha = 1, A = C = 0, and T counts all
steps, with evidence or without, from the first whose learning rate is not 0. At threshold 0 only signs enter A and C,
so neither loss scale nor clipping changes them and their sums are integers, the same in any order and under any
sharding. f multiplies and never selects, so NaN and inf go where they go in torch's.
docs/algorithm.md says what is known about all this and what is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rounding import Rounding, consecutive, key_of, round_into_


def classify(grad: Tensor, exp_avg: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Judge every coordinate: (agree, conflict), two bool tensors of grad's shape; neutral is neither.

    ``exp_avg`` is the first moment before this step. At threshold 0 only signs are compared and ``grad`` may be
    scaled by any positive number; above 0 ``grad`` must be the true gradient. Products that could underflow are
    avoided: m * g < -threshold * g^2 is compared after division by |g|.
    """
    signed = exp_avg * grad.sign()
    # at 0 no product with the threshold, because 0 * inf is NaN
    conflict = signed < (grad.to(exp_avg.dtype).abs() * -threshold if threshold > 0 else 0)
    return (grad != 0) & ~conflict, conflict


def alpha_from_counts(agree: Tensor, conflict: Tensor, gamma: float, alpha_max: float) -> Tensor:
    """alpha of each scope from its counts, float64 tensors of equal shape. 1 where nothing agrees."""
    ratio = (1 - gamma) * conflict / agree.clamp(min=1)
    return torch.where(agree > 0, 1 + ratio, 1.0).clamp(max=alpha_max)


def strengths(alpha: Tensor, applied: Tensor, gamma: float, alpha_warmup: int) -> tuple[Tensor, Tensor]:
    """f where coordinates agree (shape of ``alpha``) and where they conflict (0-dim), both float64.

    ``applied`` is T, the number of whole-model steps applied so far with this one counted, a 0-dim tensor.
    """
    r = (applied / alpha_warmup).clamp(max=1.0) if alpha_warmup > 0 else torch.ones_like(applied)
    return 1 + r * (alpha - 1), 1 - r * (1 - gamma)


def factor(agree: Tensor, conflict: Tensor, f_agree: Tensor, f_conflict: Tensor, dtype: torch.dtype) -> Tensor:
    """f for every coordinate, in ``dtype``, from the masks of :func:`classify` and two 0-dim strengths."""
    one = torch.ones((), dtype=dtype, device=agree.device)
    return torch.where(agree, f_agree.to(dtype), torch.where(conflict, f_conflict.to(dtype), one))


def rate(lr: float | Tensor) -> float | Tensor:
    """A learning rate to compute with. torch computes in a tensor's dtype: in 16 bits 1 - lr * decay is mostly 1."""
    return lr.double() if isinstance(lr, Tensor) and lr.dtype not in (torch.float32, torch.float64) else lr


def scaled(lr: float | Tensor, lr_scale: float) -> float | Tensor:
    """The learning rate of a parameter group, from its two keys. At lr_scale 1 it is ``lr`` itself, to the bit."""
    return lr if lr_scale == 1 else rate(lr) * lr_scale


def decay_of(lr: float | Tensor, weight_decay: float) -> float:
    """What decay leaves of a parameter: 1 - lr * weight_decay."""
    return float(1 - rate(lr) * weight_decay)


def size_of(lr: float | Tensor, divisor: float = 1.0) -> float:
    """What a direction is multiplied by: -lr / divisor."""
    return float(-(rate(lr) / divisor))


def sizes_of(lr: float | Tensor, beta: float, steps: Sequence[float], lookahead: float = 0.0) -> list[float]:
    """:func:`size_of` for Adam's parameters at several steps, most of them at the same."""
    sizes = {step: size_of(lr, (1 - beta**step) * (1 + lookahead)) for step in set(steps)}
    return [sizes[step] for step in steps]


def add_scaled_(into: Tensor, tensor: Tensor, scale: float | Tensor) -> Tensor:
    """into += scale * tensor, as torch's ``add_(tensor, alpha=scale)``, with the same bits wherever an element lies.

    In 16 bits on the CPU torch rounds the product in the last elements of a tensor and not in those that fill a vector.
    Here none is: ``scale`` is rounded as torch rounds it, which makes products exact in fp32.
    """
    if into.device.type != "cpu" or into.element_size() > 2:
        return into.add_(tensor, alpha=float(scale))
    rounded = float(torch.tensor(float(scale), dtype=into.dtype, device="cpu"))
    return into.copy_(into.float().add_(tensor, alpha=rounded))


def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    f: Tensor,
    *,
    step: float,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    lookahead: float = 0.0,
) -> None:
    """One AdamW update (arXiv 1711.05101), the direction multiplied by ``f``. Mutates param, exp_avg and exp_avg_sq.

    ``step`` is t, this parameter's number of updates with this one counted. The operations and their order are those
    of torch.optim.AdamW(foreach=False, fused=False), so f = 1 gives its bits. ``lookahead`` is c, 0 or more: the
    direction's numerator is (m^ + c g) / (1 + c), written as (m + c (1 - beta1^t) g) / ((1 - beta1^t) (1 + c)).
    """
    beta1, beta2 = betas
    param.mul_(decay_of(lr, weight_decay))
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    ahead = add_scaled_(exp_avg.clone(), grad, lookahead * (1 - beta1**step)) if lookahead else exp_avg
    param.addcdiv_(ahead * f, denom, value=size_of(lr, (1 - beta1**step) * (1 + lookahead)))


def lion_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    f: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """One Lion update (arXiv 2302.06675, algorithm 2), the sign multiplied by ``f``. Mutates param and exp_avg."""
    beta1, beta2 = betas
    param.mul_(decay_of(lr, weight_decay))
    sign = exp_avg.lerp(grad, 1 - beta1).sign_()
    add_scaled_(param, sign.mul_(f), size_of(lr))
    exp_avg.lerp_(grad, 1 - beta2)


def sgd_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    f: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    """One update of SGD with momentum, the direction multiplied by ``f``. Mutates param and momentum_buffer.

    The operations and their order are those of torch.optim.SGD(foreach=False, fused=False, dampening=0), but for the
    decay, which is decoupled (arXiv 1711.05101, algorithm 1): f = 1 without decay gives its bits. For parameters in 16
    bits on the CPU torch has two kinds of those, see :func:`add_scaled_`.
    """
    param.mul_(decay_of(lr, weight_decay))
    momentum_buffer.mul_(momentum).add_(grad)
    direction = add_scaled_(grad.clone(), momentum_buffer, momentum) if nesterov else momentum_buffer
    add_scaled_(param, direction * f, size_of(lr))


def rounded_(
    direction: Callable[..., None],
    param: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    f: Tensor,
    rounding: Rounding,
    at: int,
    **hyperparameters: Any,
) -> None:
    """One update in fp32 of what is kept in bf16, rounded back by the bits of the list's tensor ``at``.

    ``grad`` and ``f`` are fp32, ``moments`` bf16, ``param`` bf16, or fp32, which is then updated as it is. Mutates
    param and moments.
    """
    kept = [param, *moments]
    wide = [tensor if tensor.dtype == torch.float32 else tensor.float() for tensor in kept]
    direction(wide[0], grad, *wide[1:], f, **hyperparameters)
    for number, (into, value) in enumerate(zip(kept, wide, strict=True)):
        if into is not value:
            round_into_(into, value, rounding, at, number)


@dataclass
class Coordinates:
    """One parameter tensor with its moments and hyperparameters, as :func:`step_` takes it.

    ``moments`` and ``hyperparameters`` are those of the direction; where that takes ``step``, the hyperparameters
    hold the number of updates so far. ``name`` is the parameter's in the model, which rounding reads.
    """

    param: Tensor
    moments: list[Tensor]
    hyperparameters: dict[str, Any]
    name: str = ""


@dataclass
class Memory:
    """What a run carries from step to step beside the moments: T, and alpha, A and C of the last step with evidence.

    With gamma = 1 they are 1, 0 and 0, and T counts as n does: all steps, also those without evidence, from the first
    whose learning rate is not 0.
    """

    applied: float = 0.0
    alpha: float = 1.0
    agree: float = 0.0
    conflict: float = 0.0
    n: int = 0


def _norm(present: list[tuple[Coordinates, Tensor]]) -> Tensor:
    """The L2 norm of all gradients together, 0-dim float64."""
    squares = [g.double().square().sum() for _, g in present]
    return sum(squares, torch.zeros((), dtype=torch.float64, device="cpu")).sqrt()


def _clipped(present: list[tuple[Coordinates, Tensor]], clip_norm: float) -> list[tuple[Coordinates, Tensor]]:
    """Parameters and gradients, these scaled to a global L2 norm of at most ``clip_norm``."""
    coefficient = (clip_norm / (_norm(present) + 1e-6)).clamp(max=1.0)
    return [(c, g * coefficient.to(g.dtype)) for c, g in present]


def _remember(memory: Memory, counts: Tensor, alpha: Tensor, gamma: float, moved: bool) -> None:
    """A step has been applied, with these counts of the whole model, float64 (2,), and this alpha. Mutates memory."""
    memory.n += moved
    if gamma == 1:
        memory.applied += moved
        memory.alpha, memory.agree, memory.conflict = 1.0, 0.0, 0.0
    elif counts.sum() > 0:
        memory.applied, memory.alpha = memory.applied + 1, float(alpha)
        memory.agree, memory.conflict = (float(x) for x in counts)


def step_(
    model: Sequence[Coordinates], grads: Sequence[Tensor | None], memory: Memory,
    direction: Callable[..., None] = adam_, *,
    gamma: float = 0.0, alpha_max: float = 4.0, threshold: float = 0.0, alpha_warmup: int = 0, scope: str = "global",
    sync: str = "exact", clip_norm: float | None = None, maximize: bool = False,
    state_dtype: str | None = None, rounding_seed: int = 0, lookahead: float = 0.0, skip_nonfinite: bool = False,
) -> list[float]:  # fmt: skip
    """One whole step of the rule over all parameters of a model, in one process. Mutates model and memory.

    ``direction`` is :func:`adam_`, :func:`lion_`, :func:`sgd_` or another of their kind. Returns the alpha that each
    parameter was updated with. ``sync="delayed"`` takes alpha from the counts of the step before. A gradient None
    means no evidence, no update, no decay; a step without any evidence leaves memory as it is, but for n. With
    gamma = 1 nothing is counted. ``clip_norm`` scales the gradients by min(1, clip_norm / (global L2 norm + 1e-6))
    first, as torch's clip_grad_norm_ does. ``skip_nonfinite``: where that norm is NaN or infinite nothing happens and
    nothing is returned.
    ``state_dtype="bfloat16"``: moments are bf16, parameters bf16 or fp32; all is computed in fp32, and what is bf16 is
    rounded as rounding.py says. ``lookahead`` is what :func:`adam_` takes; 0 for the others.
    """
    ahead = {"lookahead": lookahead} if lookahead else {}
    present = [(c, -g if maximize else g) for c, g in zip(model, grads, strict=True) if g is not None]
    if state_dtype is not None:
        present = [(c, g.float()) for c, g in present]
    if skip_nonfinite and not _norm(present).isfinite():
        return []
    if clip_norm is not None:
        present = _clipped(present, clip_norm)

    masks = [classify(g, c.moments[0].to(g.dtype) if state_dtype else c.moments[0], threshold) for c, g in present]
    rows = [[int(agree.sum()), int(conflict.sum())] for agree, conflict in masks]
    counts = torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, 2)  # also where no gradient is there
    total = counts.sum(0)
    if sync == "delayed":
        last = torch.tensor([memory.agree, memory.conflict], dtype=torch.float64, device="cpu")
        alpha = alpha_from_counts(last[0], last[1], gamma, alpha_max)
    else:
        alpha = alpha_from_counts(total[0], total[1], gamma, alpha_max)
    per_parameter = alpha.expand(len(present))
    if scope == "layer":
        per_parameter = alpha_from_counts(counts[:, 0], counts[:, 1], gamma, alpha_max)

    applied = torch.tensor(memory.applied + 1, dtype=torch.float64, device="cpu")
    f_agree, f_conflict = strengths(per_parameter, applied, gamma, alpha_warmup)
    n = memory.n + 1
    for (c, g), (agree, conflict), f in zip(present, masks, f_agree, strict=True):
        if "step" in c.hyperparameters:
            c.hyperparameters["step"] += 1
        by = factor(agree, conflict, f, f_conflict, g.dtype)
        if state_dtype is None:
            direction(c.param, g, *c.moments, by, **c.hyperparameters, **ahead)
        else:
            rounding = Rounding(n, [key_of(rounding_seed, c.name)], [consecutive(0, g.numel())])
            rounded_(direction, c.param, g, c.moments, by, rounding, 0, **c.hyperparameters, **ahead)

    moved = memory.n > 0 or any(float(c.hyperparameters["lr"]) != 0 for c in model)
    _remember(memory, total, alpha, gamma, moved)
    return [float(a) for a in per_parameter]
