"""The definition of AlphaAdam, AlphaLion and AlphaSGD in plain Python floats, a coordinate at a time.

Written from the formulas of the design, sharing nothing with the library: no tensors, no vectorised masks, and the
conflict test exactly as it is printed, as a product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Weights:
    """One parameter tensor, flattened."""

    p: list[float]
    m: list[float] = field(default_factory=list)
    v: list[float] = field(default_factory=list)
    t: int = 0
    kind: str = "adam"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    momentum: float = 0.9
    nesterov: bool = False

    def direction(self, i: int, g: float) -> float:
        """d of one coordinate, its moments updated."""
        m = self.m[i]
        if self.kind == "lion":
            u = self.beta1 * m + (1 - self.beta1) * g
            self.m[i] = self.beta2 * m + (1 - self.beta2) * g
            return (u > 0) - (u < 0)
        if self.kind == "sgd":
            self.m[i] = self.momentum * m + g
            return g + self.momentum * self.m[i] if self.nesterov else self.m[i]
        self.m[i] = m + (1 - self.beta1) * (g - m)
        self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * g * g
        corrected = math.sqrt(self.v[i]) / math.sqrt(1 - self.beta2**self.t) + self.eps
        return self.m[i] / (1 - self.beta1**self.t) / corrected

    def __post_init__(self) -> None:
        self.m = self.m or [0.0] * len(self.p)
        self.v = self.v or [0.0] * len(self.p)


def judge(m: float, g: float, tau: float) -> str:
    if g == 0:
        return "neutral"
    if tau == 0:
        return "conflict" if (m > 0 and g < 0) or (m < 0 and g > 0) else "agree"
    return "conflict" if m * g < -tau * g * g else "agree"


@dataclass
class Run:
    """A model and the options of its optimizer; T, alpha, A and C as they stand after the last step."""

    weights: list[Weights]
    gamma: float = 0.0
    alpha_max: float = 4.0
    threshold: float = 0.0
    alpha_warmup: int = 0
    scope: str = "global"
    sync: str = "exact"
    clip_norm: float | None = None
    maximize: bool = False
    T: float = 0.0
    alpha: float = 1.0
    A: float = 0.0
    C: float = 0.0

    def strength(self, A: float, C: float) -> float:
        return 1.0 if A == 0 else min(self.alpha_max, 1 + (1 - self.gamma) * C / A)

    def step(self, grads: list[list[float] | None]) -> None:
        true: list[list[float] | None] = []
        for grad in grads:
            true.append(None if grad is None else [-g if self.maximize else g for g in grad])
        if self.clip_norm is not None:
            norm = math.sqrt(sum(g * g for grad in true if grad is not None for g in grad))
            scale = min(1.0, self.clip_norm / (norm + 1e-6))
            true = [None if grad is None else [g * scale for g in grad] for grad in true]

        marks: list[list[str]] = []
        for w, grad in zip(self.weights, true, strict=True):
            marks.append([judge(m, g, self.threshold) for m, g in zip(w.m, grad or [], strict=grad is not None)])
        A = sum(mark.count("agree") for mark in marks)
        C = sum(mark.count("conflict") for mark in marks)
        alpha = self.strength(self.A, self.C) if self.sync == "delayed" else self.strength(A, C)
        r = min(1.0, (self.T + 1) / self.alpha_warmup) if self.alpha_warmup else 1.0

        for w, grad, mark in zip(self.weights, true, marks, strict=True):
            if grad is None:
                continue
            layer_alpha = self.strength(mark.count("agree"), mark.count("conflict"))
            own = layer_alpha if self.scope == "layer" else alpha
            f = {"agree": 1 + r * (own - 1), "conflict": 1 - r * (1 - self.gamma), "neutral": 1.0}
            w.t += 1
            for i, g in enumerate(grad):
                w.p[i] *= 1 - w.lr * w.weight_decay
                w.p[i] -= w.lr * f[mark[i]] * w.direction(i, g)

        if A + C > 0:
            self.T += 1
            self.alpha, self.A, self.C = alpha, A, C
