"""The rule of docs/algorithm.md, written a second time: numpy, float64, whole tensors, one process.

Written from that page alone. Nothing of the library is imported here, so that what the two have in common is the page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

MOMENTS = {"AlphaAdam": ("exp_avg", "exp_avg_sq"), "AlphaLion": ("exp_avg",), "AlphaSGD": ("momentum_buffer",)}
"""The state of each optimizer; the masks read the first."""


@dataclass
class Options:
    gamma: float = 0.0
    lookahead: float = 0.0
    alpha_max: float = 4.0
    threshold: float = 0.0
    alpha_warmup: int = 0
    scope: str = "global"
    sync: str = "exact"
    clip_norm: float | None = None
    maximize: bool = False


@dataclass
class Parameter:
    """One whole parameter; ``moments`` is empty before its first update, ``t`` is the number of its updates."""

    value: Array
    group: dict[str, Any]
    moments: dict[str, Array] = field(default_factory=dict)
    t: int = 0

    def moment(self, name: str) -> Array:
        return self.moments.get(name, np.zeros_like(self.value))


@dataclass
class Memory:
    """What a run carries beside the moments: T, and alpha and counts of the last step that had evidence.

    ``n`` counts all steps from the first whose learning rate is not 0, and with gamma 1 T goes with it.
    """

    T: int = 0
    alpha: float = 1.0
    agree: int = 0
    conflict: int = 0
    alphas: dict[str, float] = field(default_factory=dict)  # by parameter; one that is not in it has 1
    n: int = 0


class Rule:
    """An optimizer by the page. Whoever plays events may change ``options``, ``memory`` and the groups."""

    def __init__(self, kind: str, options: Options) -> None:
        self.kind, self.options = kind, options
        self.parameters: dict[str, Parameter] = {}
        self.memory = Memory()

    def add(self, name: str, value: Array, group: dict[str, Any]) -> None:
        self.parameters[name] = Parameter(value.astype(np.float64), group)

    def true_gradients(self, given: dict[str, Array]) -> dict[str, Array]:
        factor = -1.0 if self.options.maximize else 1.0
        if self.options.clip_norm is not None:
            norm = np.sqrt(sum(float((g**2).sum()) for g in given.values()))
            factor *= min(1.0, self.options.clip_norm / (norm + 1e-6))
        return {name: g * factor for name, g in given.items()}

    def step(self, given: dict[str, Array]) -> None:
        """One step. A parameter that is left out of ``given`` has no gradient: None."""
        grads = self.true_gradients(given)
        conflicts = {name: self.conflict(name, g) for name, g in grads.items()}
        counts = {}
        for name, g in grads.items():
            conflicting = np.count_nonzero(conflicts[name])
            counts[name] = np.count_nonzero(g) - conflicting, conflicting
        agree, conflict = (sum(count[i] for count in counts.values()) for i in (0, 1))

        before = self.memory
        moves = before.n > 0 or any(parameter.group["lr"] != 0 for parameter in self.parameters.values())
        n = before.n + moves
        if self.options.gamma == 1:
            self.memory = Memory(before.T + moves, n=n)
        elif agree + conflict:  # a step without any evidence changes neither T nor alpha nor pending counts
            used = (agree, conflict) if self.options.sync == "exact" else (before.agree, before.conflict)
            alphas = {name: self.alpha_of(*count) for name, count in counts.items()}
            self.memory = Memory(before.T + 1, self.alpha_of(*used), agree, conflict, alphas, n)
        else:
            before.n = n
        for name, g in grads.items():
            self.update(name, g, conflicts[name])

    def conflict(self, name: str, g: Array) -> Array:
        m = self.parameters[name].moment(MOMENTS[self.kind][0])
        if self.options.threshold == 0:  # opposite signs
            return np.sign(m) * np.sign(g) < 0
        return (g != 0) & (m * g < -self.options.threshold * g**2)

    def alpha_of(self, agree: int, conflict: int) -> float:
        if agree == 0:
            return 1.0
        return min(self.options.alpha_max, 1 + (1 - self.options.gamma) * conflict / agree)

    def alpha(self, name: str) -> float:
        """Of the scope of a parameter, in the last step."""
        return self.memory.alphas.get(name, 1.0) if self.options.scope == "layer" else self.memory.alpha

    def factor(self, name: str, g: Array, conflict: Array) -> Array:
        warmup = self.options.alpha_warmup
        r = min(1.0, self.memory.T / warmup) if warmup else 1.0
        agreeing, held_back = 1 + r * (self.alpha(name) - 1), 1 - r * (1 - self.options.gamma)
        return np.where(g == 0, 1.0, np.where(conflict, held_back, agreeing))

    def update(self, name: str, g: Array, conflict: Array) -> None:
        parameter = self.parameters[name]
        group, f = parameter.group, self.factor(name, g, conflict)
        parameter.value = parameter.value * (1 - group["lr"] * group["weight_decay"])
        d = direction(self.kind, parameter, g, self.options.lookahead)
        parameter.value = parameter.value - group["lr"] * f * d


def direction(kind: str, parameter: Parameter, g: Array, lookahead: float) -> Array:
    """d of the page's table, the moments updated."""
    parameter.moments = {name: parameter.moment(name) for name in MOMENTS[kind]}
    parameter.t += 1
    if kind == "AlphaAdam":
        return adam(parameter, g, lookahead)
    return lion(parameter, g) if kind == "AlphaLion" else sgd(parameter, g)


def adam(parameter: Parameter, g: Array, lookahead: float) -> Array:
    (beta1, beta2), moments, t = parameter.group["betas"], parameter.moments, parameter.t
    moments["exp_avg"] = m = moments["exp_avg"] + (1 - beta1) * (g - moments["exp_avg"])
    moments["exp_avg_sq"] = v = beta2 * moments["exp_avg_sq"] + (1 - beta2) * g**2
    ahead = (m / (1 - beta1**t) + lookahead * g) / (1 + lookahead)
    return ahead / (np.sqrt(v) / np.sqrt(1 - beta2**t) + parameter.group["eps"])


def lion(parameter: Parameter, g: Array) -> Array:
    (beta1, beta2), m = parameter.group["betas"], parameter.moments["exp_avg"]
    parameter.moments["exp_avg"] = beta2 * m + (1 - beta2) * g
    return np.sign(beta1 * m + (1 - beta1) * g)


def sgd(parameter: Parameter, g: Array) -> Array:
    momentum = parameter.group["momentum"]
    parameter.moments["momentum_buffer"] = m = momentum * parameter.moments["momentum_buffer"] + g
    return g + momentum * m if parameter.group["nesterov"] else m
