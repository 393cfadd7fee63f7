"""Three problems on which mask optimizers, or Adam itself, are known or suspected to go wrong.

Each has many coordinates, so that counts and alpha are statistics as in a model. None has an embedding or a schedule
of its own: the learning rate decays as in the other tasks, so a wrong end point is a bias and not the size of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .trial import Task, Trial

STEPS = 1000
SIZE = 256


def reddi(seed: int) -> Trial:
    """f is 1010 x once in a hundred steps and -10 x else, on [-1, 1] (Reddi et al., arXiv 1904.09237, section 3).

    The mean gradient is 0.2, so the optimum is -1; Adam is known to go to +1. Every coordinate draws for itself.
    Measured is the mean of x + 1: 0 at the optimum, 2 at the wrong end.
    """
    x = nn.Parameter(torch.zeros(SIZE))
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        rare = torch.rand(SIZE, generator=generator) < 0.01
        return (torch.where(rare, 1010.0, -10.0) * x).sum()

    def project() -> None:
        x.data.clamp_(-1.0, 1.0)

    return Trial([x], loss, lambda: [float(x.detach().mean() + 1)], project=project)


def skewed(seed: int) -> Trial:
    """x^2 / 2 with a noise of mean 0 on the gradient: 5 (E - 1), E exponential. Optimum 0.

    Most samples push gently one way and a few push hard the other way, and a sign test hears only how many.
    Measured is the mean of x^2.
    """
    generator = torch.Generator().manual_seed(seed)
    x = nn.Parameter(torch.randn(SIZE, generator=generator))

    def loss(step: int) -> Tensor:
        noise = 5.0 * (torch.empty(SIZE).exponential_(generator=generator) - 1)
        return (x.square() / 2 + noise * x).sum()

    return Trial([x], loss, lambda: [float(x.detach().square().mean())])


def rotated(seed: int) -> Trial:
    """x' H x / 2 with eigenvalues from 1e-3 to 1 along random directions, so that no coordinate is an axis of it.

    No noise: conflict here means that a coordinate overshot. Measured is the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    hessian = basis @ torch.diag(torch.logspace(-3, 0, SIZE)) @ basis.T
    x = nn.Parameter(torch.randn(SIZE, generator=generator))

    def loss(step: int) -> Tensor:
        return x @ hessian @ x / 2

    return Trial([x], loss, lambda: [float(loss(0).detach())])


WRONG_END, SQUARED, LOSS = "mean distance from the optimum", "mean squared error", "loss"
TASKS = (
    Task("reddi", "Reddi's stochastic linear problem", WRONG_END, STEPS, 10, reddi),
    Task("skewed", "quadratic with skewed noise", SQUARED, STEPS, 13, skewed),
    Task("rotated", "rotated ill-conditioned quadratic", LOSS, STEPS, 13, rotated),
)
# half octaves above 1e-3: from 0.011 to 0.09, and from 0.011 to 1
RATES = {"reddi": (7, 10, 13), "skewed": (7, 13, 20), "rotated": (7, 13, 20)}
