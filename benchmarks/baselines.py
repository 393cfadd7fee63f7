"""The optimizers AlphaAdam is measured against, in plain eager torch, each written from its published rule.

In all of them g is the gradient, m and v are Adam's moments with g in them already, and u = m_hat / (sqrt(v_hat) + eps)
is Adam's direction. Weight decay is decoupled. One process, dense gradients, no schedule of their own.

The last three are controls, not proposals: each takes one idea out of AlphaAdam and keeps the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from alphaadam_dist import AlphaAdam, rounding, rule

Held = tuple[Tensor, Tensor, dict[str, Any]]  # parameter, gradient, parameter group


class _Baseline(Optimizer, ABC):
    """``step`` hands the parameters that have a gradient, of all groups, to ``_update``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update([(p, p.grad, g) for g in self.param_groups for p in g["params"] if p.grad is not None])
        return loss

    @abstractmethod
    def _update(self, held: list[Held]) -> None:
        """Step every parameter in the list."""


class _AdamW(_Baseline):
    """AdamW's hyperparameters and moments."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _moments(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        return state


class _Factored(_AdamW):
    """AdamW whose direction u is multiplied by ``_factor(u, g)``, one parameter tensor at a time."""

    def _update(self, held: list[Held]) -> None:
        for param, grad, group in held:
            state, (beta1, beta2) = self._moments(param), group["betas"]
            state["step"] += 1
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denom = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            u = self._momentum(state["exp_avg"], grad, beta1, state["step"]) / denom
            param.sub_(self._decayed(param, u), alpha=group["lr"] * group["weight_decay"])
            param.sub_(u.mul_(self._factor(u, grad)), alpha=group["lr"])

    def _momentum(self, exp_avg: Tensor, grad: Tensor, beta1: float, step: int) -> Tensor:
        """u's numerator, a new tensor."""
        return exp_avg / (1 - beta1**step)

    def _decayed(self, param: Tensor, u: Tensor) -> Tensor:
        """What weight decay takes a share of."""
        return param

    def _factor(self, u: Tensor, grad: Tensor) -> Tensor | float:
        """What the direction ``u`` is multiplied by, of its shape."""
        return 1.0


class NAdamW(_Factored):
    """Nesterov's momentum in AdamW (Dozat 2016), beta1 constant: b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)."""

    def _momentum(self, exp_avg: Tensor, grad: Tensor, beta1: float, step: int) -> Tensor:
        ahead = exp_avg * (beta1 / (1 - beta1 ** (step + 1)))
        return ahead.add_(grad, alpha=(1 - beta1) / (1 - beta1**step))


class LookAhead(_Factored):
    """AlphaAdam's look-ahead without masks, (m^ + c g) / (1 + c), whose c may be set before every step.

    ``cautious_decay`` True decays only where u moves the parameter towards 0, too (arXiv 2510.12402).
    """

    def __init__(self, params: ParamsT, *, lookahead: float = 0.0, cautious_decay: bool = False, **adamw: Any) -> None:
        self.lookahead, self.cautious_decay = lookahead, cautious_decay
        super().__init__(params, **adamw)

    def _momentum(self, exp_avg: Tensor, grad: Tensor, beta1: float, step: int) -> Tensor:
        return (exp_avg / (1 - beta1**step)).add_(grad, alpha=self.lookahead).div_(1 + self.lookahead)

    def _decayed(self, param: Tensor, u: Tensor) -> Tensor:
        return param * (u * param >= 0) if self.cautious_decay else param


class CAdamW(_Factored):
    """Cautious AdamW (arXiv 2411.16085), as released: u * g > 0 steps, by n / kept of its tensor, 1000 at most."""

    def _factor(self, u: Tensor, grad: Tensor) -> Tensor:
        mask = (u * grad > 0).to(u.dtype)
        return mask / mask.mean().clamp_(min=1e-3)


class MGUPAdamW(_Factored):
    """MGUP (arXiv 2606.17526): the floor(tau * n) largest u * g of a tensor step by ``alpha``, the rest by ``gamma``.

    The defaults are those of the released code; the paper has alpha = 1 / tau and gamma = tau.
    """

    def __init__(
        self, params: ParamsT, *, tau: float = 0.5, alpha: float = 2.0, gamma: float = 0.1, **adamw: Any
    ) -> None:
        self.tau, self.alpha, self.gamma = tau, alpha, gamma
        super().__init__(params, **adamw)

    def _factor(self, u: Tensor, grad: Tensor) -> Tensor:
        largest = (u * grad).flatten().topk(int(self.tau * u.numel()), sorted=False).indices
        return torch.full_like(u, self.gamma).flatten().index_fill_(0, largest, self.alpha).view_as(u)


class CMGUPAdamW(_Factored):
    """MGUP's cautious form: coordinates with u * g >= 0 step by ``alpha``, the rest by ``gamma``.

    As released, a coordinate without a gradient, an embedding row without a token, steps by ``alpha`` as well.
    ``evidence`` True lets it step by 1.
    """

    def __init__(
        self, params: ParamsT, *, alpha: float = 2.0, gamma: float = 0.1, evidence: bool = False, **adamw: Any
    ) -> None:
        self.alpha, self.gamma, self.evidence = alpha, gamma, evidence
        super().__init__(params, **adamw)

    def _factor(self, u: Tensor, grad: Tensor) -> Tensor:
        factor = torch.full_like(u, self.gamma).masked_fill_(u * grad >= 0, self.alpha)
        return factor.masked_fill_(grad == 0, 1.0) if self.evidence else factor


class Lion(_Baseline):
    """Lion (arXiv 2302.06675): the sign of b1 m + (1 - b1) g, then m = b2 m + (1 - b2) g."""

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, held: list[Held]) -> None:
        for param, grad, group in held:
            state, (beta1, beta2) = self.state[param], group["betas"]
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.sub_(state["exp_avg"].lerp(grad, 1 - beta1).sign_(), alpha=group["lr"])
            state["exp_avg"].lerp_(grad, 1 - beta2)


class _MaskControl(_AdamW):
    """AlphaAdam's step at threshold 0 and gamma 0, with its masks or its alpha replaced in ``_mask``."""

    def _update(self, held: list[Held]) -> None:
        masks, alpha = self._mask([rule.classify(grad, self._moments(param)["exp_avg"]) for param, grad, _ in held])
        for (param, grad, group), (agree, conflict) in zip(held, masks, strict=True):
            state = self._moments(param)
            state["step"] += 1
            f = rule.factor(agree, conflict, alpha, alpha.new_zeros(()), param.dtype)
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            rule.adam_(param, grad, state["exp_avg"], state["exp_avg_sq"], f, step=state["step"], **options)

    @abstractmethod
    def _mask(self, masks: list[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """(agree, conflict) of every parameter, and alpha as a 0-dim float64 tensor, from AlphaAdam's own masks."""


class ConstantAlpha(_MaskControl):
    """Control: AlphaAdam's masks with one fixed alpha. What it loses, the dynamic alpha is worth."""

    def __init__(self, params: ParamsT, *, alpha: float = 2.0, **adamw: Any) -> None:
        self.alpha = alpha
        super().__init__(params, **adamw)

    def _mask(self, masks: list[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        return masks, torch.tensor(self.alpha, dtype=torch.float64, device=masks[0][0].device)


class RandomMask(_MaskControl):
    """Control: as many coordinates held back as AlphaAdam would hold back, but chosen by lot. alpha follows its rule.

    What it loses, knowing WHICH coordinates conflict is worth. The lot falls over all coordinates with evidence, each
    with the model's share of conflicts, from a generator seeded with ``seed``.
    """

    def __init__(self, params: ParamsT, *, seed: int = 0, **adamw: Any) -> None:
        super().__init__(params, **adamw)
        device = self.param_groups[0]["params"][0].device
        self.generator = torch.Generator(device).manual_seed(seed)

    def _mask(self, masks: list[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        counts = _counts(masks)
        share = counts[1] / counts.sum().clamp(min=1)
        drawn = []
        for agree, conflict in masks:
            held_back = torch.rand(agree.shape, generator=self.generator, device=agree.device) < share
            drawn.append(((agree | conflict) & ~held_back, (agree | conflict) & held_back))
        agreeing, conflicting = _counts(drawn)
        return drawn, rule.alpha_from_counts(agreeing, conflicting, gamma=0.0, alpha_max=4.0)


class RoundsToNearest(AlphaAdam):
    """AlphaAdam whose bf16 state is rounded to the nearest, halves away from zero: half a unit in place of chance."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with mock.patch.object(rounding, "random_bits", _half_a_unit):
            return super().step(closure)


def _half_a_unit(_key: int, _positions: Any, numel: int, *, device: torch.device | None = None, **_: Any) -> Tensor:
    return torch.full((numel,), 2**15, device=device)


def _counts(masks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Agreeing and conflicting coordinates over all parameters, float64 of shape (2,)."""
    return torch.stack([torch.stack((agree.sum(), conflict.sum())) for agree, conflict in masks]).sum(0).double()
