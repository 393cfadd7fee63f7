"""What a program must come to: its events played by the rule in numpy, with gradients that leave nothing to rounding.

Gradients lie on a grid of 1/16 and are drawn beside the rule. One whose mask or whose sign of a momentum would hang on
less than a thousand roundings is made zero, so counts must be equal to the last one and not nearly so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .programs import Event, Unit
from .rule_in_numpy import MOMENTS, Array, Memory, Options, Parameter, Rule, direction

ROUNDINGS = 8  # of an element in one step, in whatever order and fused or not
SAFE = 1000.0  # roundings that may not decide a mask


@dataclass
class Expected:
    """After an event: the whole model, flat in the order of the names, and what the optimizer must say of itself.

    ``gradient`` is what a step is given, of the parameters in ``present``. ``bound`` is how far each may be off.
    """

    event: Event
    memory: Memory
    alphas: dict[str, float]
    numel: int
    t: dict[str, int]
    whole: dict[str, Array]
    bound: dict[str, Array]
    present: tuple[str, ...] = ()
    gradient: Array | None = None


class Noise:
    """How far rounding may carry a step off the rule: each step's operands, in absolute value, times few roundings.

    The momentum and the direction are bounded by those of |g|, of which nothing cancels.
    """

    def __init__(self, rule: Rule, unit: Unit) -> None:
        self.rule, self.unit = rule, unit
        self.shadow: dict[str, Parameter] = {}
        self.steps: dict[str, int] = {}
        self.bound: dict[str, Array] = {}

    def add(self, name: str) -> None:
        parameter = self.rule.parameters[name]
        self.shadow[name] = Parameter(np.zeros_like(parameter.value), parameter.group)
        self.steps[name] = 0
        self.bound[name] = np.zeros_like(parameter.value)

    def rounding(self, name: str) -> float:
        return float(np.finfo(self.unit.dtype_of(name)).eps)

    def each(self, name: str) -> float:
        """Of one step. A norm, always float64, is a sum whose order nobody promises: each summand may round."""
        summands = sum(p.value.size for p in self.rule.parameters.values()) if self.rule.options.clip_norm else 0
        return ROUNDINGS * self.rounding(name) + summands / 2 * float(np.finfo("float64").eps)

    def doubtful(self, name: str, g: Array) -> Array:
        """Where the rule's answer to a true gradient hangs on rounding."""
        kind, tau, parameter = self.rule.kind, self.rule.options.threshold, self.rule.parameters[name]
        first, shadow, near = MOMENTS[kind][0], self.shadow[name], SAFE * self.rounding(name)
        m, size = parameter.moment(first), shadow.moment(first)
        mask = np.abs(m * g + tau * g**2) < near * (size * np.abs(g) + tau * g**2)
        after, bigger = copy.deepcopy(parameter), copy.deepcopy(shadow)
        direction(kind, after, g, self.rule.options.lookahead)
        direction(kind, bigger, np.abs(g), self.rule.options.lookahead)
        mask |= np.abs(after.moments[first]) < near * bigger.moments[first]
        if kind == "AlphaLion":  # its direction is a sign too
            beta = parameter.group["betas"][0]
            mask |= np.abs(beta * m + (1 - beta) * g) < near * (beta * size + (1 - beta) * np.abs(g))
        return mask

    def step(self, grads: dict[str, Array]) -> None:
        """After the rule's step with these true gradients."""
        for name, g in grads.items():
            shadow, group = self.shadow[name], self.rule.parameters[name].group
            shadow.t = self.rule.parameters[name].t - 1
            size = direction(self.rule.kind, shadow, np.abs(g), self.rule.options.lookahead)
            self.steps[name] += 1
            path = group["lr"] * max(1.0, self.rule.alpha(name)) * size * self.steps[name]
            self.bound[name] = self.bound[name] + self.each(name) * (np.abs(self.rule.parameters[name].value) + path)

    def of_moment(self, name: str, moment: str) -> Array:
        return self.each(name) * self.steps[name] * self.shadow[name].moment(moment)


class ByTheRule:
    """Plays the events of a unit; each method is an event."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        names = Options.__dataclass_fields__
        self.rule = Rule(unit.kind, Options(**{name: unit.options[name] for name in names}))
        self.noise = Noise(self.rule, unit)
        self.groups: dict[int, dict[str, Any]] = {}
        self.frozen: set[str] = set()
        self.saved: Any = None
        self.stepped_on = 0  # elements of the model in the last step
        self.given: dict[str, Array] = {}
        chance = np.random.default_rng([unit.seed, 0])
        self.values = {n: self._grid(chance.normal(size=s)) for n, s in zip(unit.names, unit.shapes, strict=True)}
        self.drift = {n: np.array(chance.normal(size=s)) for n, s in zip(unit.names, unit.shapes, strict=True)}
        for number in sorted(set(unit.group_of) - set(unit.late)):
            self.add(number)

    def play(self) -> Iterator[Expected]:
        """What there is after each event."""
        for event in self.unit.events:
            self.given = {}
            getattr(self, event.what)(**event.of)
            yield self._expected(event)

    # ---- events

    def step(self, salt: int, absent: tuple[str, ...], zero: tuple[str, ...], sparse: float, by: str) -> None:
        chance = np.random.default_rng([self.unit.seed, salt])
        for name, drift in self.drift.items():
            g = np.array(self._grid(0.6 * drift + chance.normal(size=drift.shape)))
            g[chance.random(drift.shape) < (1.0 if name in zero else sparse)] = 0.0
            if name in self.rule.parameters and name not in absent and name not in self.frozen:
                self.given[name] = g
        elements = sum(p.value.size for p in self.rule.parameters.values())
        if elements != self.stepped_on:  # alphas by layer begin anew with the layers
            self._forget_layers()
        self.stepped_on = elements
        grads = self._without_doubt()
        self.rule.step(self.given)
        self.noise.step(grads)

    def _without_doubt(self) -> dict[str, Array]:
        """Make doubtful gradients zero; the true ones. Clipping ties them all together, hence in rounds."""
        while True:
            grads = self.rule.true_gradients(self.given)
            doubtful = {name: self.noise.doubtful(name, g) & (g != 0) for name, g in grads.items()}
            if not any(mask.any() for mask in doubtful.values()):
                return grads
            for name, mask in doubtful.items():
                self.given[name][mask] = 0.0

    def lr(self, group: int, value: float) -> None:
        if group in self.groups:
            self.groups[group]["lr"] = self.unit.lr(value)

    def schedule(self, factor: float) -> None:
        """torch's schedulers remember the rate that they found, in the group."""
        for group in self.groups.values():
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def set(self, group: int, name: str, value: Any) -> None:
        if group in self.groups:
            self.groups[group][name] = value

    def freeze(self, name: str) -> None:
        self.frozen.add(name)

    def thaw(self, name: str) -> None:
        self.frozen.discard(name)

    def add(self, group: int) -> None:
        hyper = self.unit.hyper[group]
        self.groups[group] = {**hyper, "lr": self.unit.lr(hyper["lr"])}
        for name, of in zip(self.unit.names, self.unit.group_of, strict=True):
            if of == group:
                self.rule.add(name, self.values[name], self.groups[group])
                self.noise.add(name)

    def look(self, through: str) -> None:
        pass

    def swap(self) -> None:
        pass

    def damaged(self, what: str) -> None:
        """It is refused, and everything stays as it was."""

    def copy(self, how: str) -> None:
        self._forget_layers()

    def move(self, regime: str, world: int) -> None:
        self._forget_layers()

    def reload(self, through: str, file: bool) -> None:
        self._forget_layers()

    def _forget_layers(self) -> None:
        """A checkpoint does not carry the alphas by layer."""
        self.rule.memory = replace(self.rule.memory, alphas={})

    def retune(self, name: str, value: Any) -> None:
        self.rule.options = replace(self.rule.options, **{name: value})
        self._forget_layers()

    def torch(self) -> None:
        """torch's optimizer of the kind has moments, steps and hyperparameters, and nothing else."""
        self.rule.memory = Memory()
        for group in self.groups.values():
            group.pop("initial_lr", None)

    def save(self) -> None:
        held = {n: (p.moments, p.t, self.noise.shadow[n].moments) for n, p in self.rule.parameters.items()}
        self.saved = copy.deepcopy((held, self.rule.memory, self.groups))

    def rewind(self, into: str) -> None:
        held, self.rule.memory, groups = copy.deepcopy(self.saved)
        self._forget_layers()
        for name, (moments, t, shadow) in held.items():
            self.rule.parameters[name].moments, self.rule.parameters[name].t = moments, t
            self.noise.shadow[name].moments = shadow
        for number, group in groups.items():
            self.groups[number].clear()
            self.groups[number].update(group)

    # ---- what comes of them

    def _expected(self, event: Event) -> Expected:
        parameters, moments = self.rule.parameters, MOMENTS[self.unit.kind]
        whole = {"param": self._flat({**self.values, **{n: p.value for n, p in parameters.items()}})}
        bound = {"param": self._flat(self.noise.bound)}
        for moment in moments:
            whole[moment] = self._flat({n: p.moment(moment) for n, p in parameters.items()})
            bound[moment] = self._flat({n: self.noise.of_moment(n, moment) for n in parameters})
        return Expected(
            event,
            copy.copy(self.rule.memory),
            {name: self.rule.alpha(name) for name in parameters},
            self.stepped_on,
            {name: p.t for name, p in parameters.items()},
            whole,
            bound,
            tuple(self.given),
            self._flat(self.given),
        )

    def _flat(self, by_name: dict[str, Array]) -> Array:
        return np.concatenate([by_name.get(name, 0 * self.values[name]).reshape(-1) for name in self.unit.names])

    @staticmethod
    def _grid(values: Array) -> Array:
        return np.clip(np.round(values * 16), -128, 127) / 16
