"""Plays a program with the library, on a rank, and compares with the rule after every event."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import alphaadam_dist
from alphaadam_dist.optimizer import AlphaOptimizer

from ..equality.pieces import Pieces, local
from . import sharded
from .expected import Expected
from .programs import Unit
from .rule_in_numpy import MOMENTS
from .wrappers import WRAPPERS

Whole = dict[str, Any]
"""A unit between two shardings: flat "param" and moments, parameter "groups" by number, and the "options"."""


@dataclass
class Phase:
    """What happens under one sharding; ``numbers`` are the parameter groups, ``t`` the updates before."""

    regime: str
    world: int
    numbers: list[int]
    t: dict[str, int]
    trace: list[Expected] = field(default_factory=list)


class Compared:
    """An optimizer that somebody plays, beside what the rule expects of it."""

    unit: Unit
    optimizer: AlphaOptimizer
    expected: Expected
    where: str
    stepped: bool  # since it was built, loaded or copied

    def play(self, expected: Expected) -> None:
        """Let an event happen, and compare. Raises AssertionError with the event, the name and the numbers."""
        self.expected = expected
        try:
            getattr(self, expected.event.what)(**expected.event.of)
            self.compare()
        except Exception as error:
            error.add_note(f"at the event {expected.event}, on {self.where}")
            raise

    def compare(self) -> None:
        """Every parameter and moment that this rank holds."""
        raise NotImplementedError

    def seen(self, through: str) -> Any:
        """The optimizer, or a wrapper that passes for it."""
        return self.optimizer

    def look(self, through: str) -> None:
        seen, memory = self.seen(through), self.expected.memory
        metrics, counts = seen.metrics(), seen.agreement
        evidence = (memory.agree + memory.conflict) / max(1, self.expected.numel) if self.stepped else 0.0
        same("T", metrics["steps"], memory.T)
        same("alpha of the model", metrics["alpha"], memory.alpha)
        masked = self.options["gamma"] < 1
        same("evidence", metrics["evidence"], evidence if masked else None)
        same("counts", (counts["agree"], counts["conflict"]), (memory.agree, memory.conflict))
        same("the share of evidence", counts["evidence_fraction"], evidence)
        repr(seen)
        for group in self.saved_groups(seen):
            wanted = [memory.T, memory.alpha, memory.agree, memory.conflict]
            same("alphaadam_state", group["alphaadam_state"], wanted)
        if self.unit.options["scope"] == "global":
            same("alpha", seen.alpha, memory.alpha)
        elif self.stepped:
            alphas, wanted_by_key = seen.alpha, self.keyed(self.expected.alphas)
            assert alphas, "no alpha of any layer"
            same("alphas", alphas, {key: wanted_by_key[key] for key in alphas})

    def saved_groups(self, seen: Any) -> list[dict[str, Any]]:
        """Of a state_dict."""
        groups: list[dict[str, Any]] = seen.state_dict()["param_groups"]
        return groups

    def keyed(self, by_name: dict[str, float]) -> dict[str, float]:
        """By the names that the optimizer gives parameters."""
        return by_name

    def near(self, what: str, name: str, held: Tensor, at: Tensor) -> None:
        """``held`` are the elements ``at`` of the flat whole; within the bound."""
        off = np.abs(held.double().numpy() - self.expected.whole[what][at])
        bound = self.expected.bound[what][at]
        if not (off <= bound).all():
            worst = int(np.argmax(np.where(np.isnan(off), np.inf, off - bound)))
            raise AssertionError(
                f"{what} of {name}: {float(held[worst])!r}, by the rule {self.expected.whole[what][at][worst]!r}; off "
                f"by {off[worst]:.3g} where {bound[worst]:.3g} may be"
            )


def same(what: str, here: Any, wanted: Any) -> None:
    assert here == wanted, f"{what}: {here!r}, by the rule {wanted!r}"


class Player(Compared):
    """One rank's part of a unit; each method that ``play`` calls is an event."""

    def __init__(self, unit: Unit, on: sharded.Ground, phase: Phase, whole: Whole) -> None:
        self.unit, self.on, self.numbers = unit, on, list(phase.numbers)
        self.moments = MOMENTS[unit.kind]
        self.options = dict(whole["options"])
        self.where = f"rank {on.rank} of {on.world}"
        flat, values = torch.from_numpy(whole["param"]), {}
        for name, shape in zip(unit.names, unit.shapes, strict=True):
            part, flat = flat[: math.prod(shape)], flat[math.prod(shape) :]
            values[name] = part.view(shape).to(getattr(torch, unit.dtype_of(name)))
        self.cut = sharded.shard(unit, phase.regime, on, values)
        self._take(self._build())
        if "groups" in whole:
            self.optimizer.load_state_dict(self._sharded_state(whole, phase.t))

    # ---- building

    def _members(self, number: int) -> list[tuple[str, Tensor]]:
        if list(self.cut.named) == ["_flat_param"]:
            return list(self.cut.named.items())
        of = dict(zip(self.unit.names, self.unit.group_of, strict=True))
        return [(name, param) for name, param in self.cut.named.items() if of[name] == number]

    def _group(self, number: int, hyper: dict[str, Any]) -> dict[str, Any]:
        members = self._members(number)
        lr: Any = hyper["lr"]
        if self.unit.tensor_lr:
            lr = torch.tensor(lr, dtype=torch.float32 if self.unit.dtype == "float32" else torch.float64)
        return {**hyper, "lr": lr, "params": members if self.unit.named else [param for _, param in members]}

    def _build(self) -> AlphaOptimizer:
        kind = getattr(alphaadam_dist, self.unit.kind)
        self.numbers = [number for number in self.numbers if self._members(number)]
        groups = [self._group(number, self.unit.hyper[number]) for number in self.numbers]
        more = {"fused": self.unit.fused, "verify_every": self.unit.verify_every}
        return kind(groups, **self.options, **more, **self.cut.told)

    def _take(self, optimizer: AlphaOptimizer) -> None:
        self.optimizer, self.stepped = optimizer, False
        self.wrapper = WRAPPERS[self.unit.wrapper](optimizer)

    def _sharded_state(self, whole: Whole, t: dict[str, int]) -> dict[str, Any]:
        """A state_dict of this rank's from whole tensors, as a resharding checkpoint makes it."""
        state = self.optimizer.state_dict()
        for number, group in zip(self.numbers, state["param_groups"], strict=True):
            group.update(whole["groups"][number])
            for i, (name, param) in zip(group["params"], self._members(number), strict=True):
                if t.get(name):
                    held = {moment: self._part(whole[moment], name, param) for moment in self.moments}
                    steps = {"step": torch.tensor(float(t[name]))} if self.unit.kind == "AlphaAdam" else {}
                    state["state"][i] = {**steps, **held}
        return state

    def _part(self, flat: np.ndarray[Any, Any], name: str, like: Tensor) -> Tensor:
        """This rank's part of a flat whole, in the form of a parameter."""
        part = torch.zeros_like(like, requires_grad=False)
        local(part).copy_(torch.from_numpy(np.append(flat, 0.0))[self.cut.index[name]].view(local(part).shape))
        return part

    # ---- events

    def step(self, salt: int, absent: tuple[str, ...], zero: tuple[str, ...], sparse: float, by: str) -> None:
        del absent, zero, sparse  # they are in the gradient
        self.given: dict[str, Tensor] = {}
        for name, param in self.cut.named.items():
            there = name in self.expected.present or name == "_flat_param"
            if local(param).numel() == 0 and (salt + self.on.rank) % 2:
                there = False  # a rank may have no gradient of what it has nothing of
            if there:
                assert self.expected.gradient is not None
                self.given[name] = self._part(self.expected.gradient, name, param)

        def closure() -> float:
            assert torch.is_grad_enabled()
            for name, param in self.cut.named.items():
                param.grad = self.given[name].clone() if name in self.given else None
            return 0.25

        if by == "closure":
            same("what step() returns of a closure", self.optimizer.step(closure), 0.25)
        else:
            closure()
            self.seen(by).step()
        self.stepped = True
        for name, grad in self.given.items():
            kept = self.cut.named[name].grad
            assert kept is not None
            assert torch.equal(local(kept), local(grad)), f"the gradient of {name} is the caller's"

    def lr(self, group: int, value: float) -> None:
        if group in self.numbers:
            held = self.optimizer.param_groups[self.numbers.index(group)]
            if self.unit.tensor_lr:
                held["lr"].fill_(value)
            else:
                held["lr"] = value

    def schedule(self, factor: float) -> None:
        torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: factor)

    def set(self, group: int, name: str, value: Any) -> None:
        if group in self.numbers:
            self.optimizer.param_groups[self.numbers.index(group)][name] = value

    def freeze(self, name: str) -> None:
        if name in self.cut.named:
            self.cut.named[name].requires_grad_(False)

    def thaw(self, name: str) -> None:
        if name in self.cut.named:
            self.cut.named[name].requires_grad_(True)

    def add(self, group: int) -> None:
        self.numbers.append(group)
        self.optimizer.add_param_group(self._group(group, self.unit.hyper[group]))

    def copy(self, how: str) -> None:
        if how == "copy":
            self._take(copy.copy(self.optimizer))
        elif how == "deepcopy":
            self._take(copy.deepcopy(self.optimizer, {id(param): param for param in self.cut.named.values()}))
        else:
            optimizer, self.cut.named = pickle.loads(pickle.dumps((self.optimizer, self.cut.named)))
            optimizer.process_group = self.cut.told.get("process_group")  # no pickle can hold it
            self._take(optimizer)

    def reload(self, through: str, file: bool) -> None:
        state = self.seen(through).state_dict()
        if file:
            written = io.BytesIO()
            torch.save(state, written)
            written.seek(0)
            state = torch.load(written, weights_only=True)
        self._take(self._build())
        self.optimizer.load_state_dict(state)

    def retune(self, name: str, value: Any) -> None:
        self.options[name] = value
        self.reload("itself", False)

    def torch(self) -> None:
        """Into torch's optimizer of the kind, and its checkpoint into a new one of ours."""
        names = set(self.unit.hyper[0])
        groups = [{k: v for k, v in group.items() if k in ("params", *names)} for group in self.optimizer.param_groups]
        theirs: Any = (torch.optim.AdamW if self.unit.kind == "AlphaAdam" else torch.optim.SGD)(groups)
        for param, state in self.optimizer.state.items():
            theirs.state[param] = {name: value.clone() for name, value in state.items()}
        self._take(self._build())
        self.optimizer.load_state_dict(theirs.state_dict())

    def save(self) -> None:
        self.saved = copy.deepcopy(self.optimizer.state_dict())

    def rewind(self, into: str) -> None:
        if into == "another":
            self._take(self._build())
        self.optimizer.load_state_dict(copy.deepcopy(self.saved))

    def damaged(self, what: str) -> None:
        state = copy.deepcopy(self.optimizer.state_dict())
        groups = state["param_groups"]
        if what == "a group more":
            groups.append({**groups[0], "params": []})
        elif what == "another's state":
            state["state"][groups[-1]["params"][-1]] = {"square_avg": torch.zeros(1)}
        elif what == "no lr":
            del groups[-1]["lr"]
        elif what == "a negative lr":
            groups[-1]["lr"] = -1.0
        else:
            damaged = [1.0, 1.0] if what == "a short alphaadam_state" else [math.nan, 1.0, 0.0, 0.0]
            for group in groups:
                group["alphaadam_state"] = damaged
        try:
            self.optimizer.load_state_dict(state)
        except ValueError:
            return
        raise AssertionError(f"a state with {what} was loaded")

    def swap(self) -> None:
        """Other tensors in the place of the parameters, as Accelerate puts them there, on every rank."""
        for name, old in list(self.cut.named.items()):
            new = self.cut.named[name] = torch.nn.Parameter(old.detach().clone(), old.requires_grad)
            for group in self.optimizer.param_groups:
                group["params"] = [new if param is old else param for param in group["params"]]
            if old in self.optimizer.state:
                self.optimizer.state[new] = self.optimizer.state.pop(old)

    def move(self, regime: str, world: int) -> None:
        """What was under another sharding is here; see _sharded_state."""

    # ---- comparing

    def seen(self, through: str) -> Any:
        return self.wrapper if through == "wrapper" else self.optimizer

    def keyed(self, by_name: dict[str, float]) -> dict[str, float]:
        if self.unit.named:
            return by_name
        return {
            f"{i}.{j}": by_name[name]
            for i, number in enumerate(self.numbers)
            for j, (name, _) in enumerate(self._members(number))
        }

    def compare(self) -> None:
        in_optimizer = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, param in self.cut.named.items():
            self._near("param", name, param)
            state = self.optimizer.state.get(param, {}) if id(param) in in_optimizer else {}
            t = self.expected.t.get(name, 0) if name != "_flat_param" else max(self.expected.t.values())
            if not state:
                assert t == 0 or not local(param).numel(), f"{name} has no state after {t} updates"
                continue
            if "step" in state and local(param).numel():
                same(f"updates of {name}", float(state["step"]), t)
            for moment in self.moments:
                self._near(moment, name, state[moment])

    def _near(self, what: str, name: str, tensor: Tensor) -> None:
        index = self.cut.index[name]
        self.near(what, name, local(tensor).detach().reshape(-1)[index >= 0], index[index >= 0])

    # ---- to another sharding

    def held(self) -> tuple[Pieces, Whole]:
        """The elements that this rank has of parameters and moments, and what it has whole."""
        pieces: Pieces = {}
        for what in ("param", *self.moments):
            tensors = {}
            for name, param in self.cut.named.items():
                state = self.optimizer.state.get(param, {})
                tensors[name] = param if what == "param" else state.get(what, torch.zeros_like(param))
            flat = torch.cat([local(t).detach().reshape(-1).double() for t in tensors.values()] or [torch.zeros(0)])
            index = torch.cat([*self.cut.index.values()] or [torch.zeros(0, dtype=torch.int64)])
            pieces[what] = index[index >= 0], flat[index >= 0]
        saved = self.optimizer.state_dict()["param_groups"]
        groups = {
            number: {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
            for number, group in zip(self.numbers, saved, strict=True)
        }
        return pieces, {"groups": groups, "options": self.options}


@contextmanager
def quietly() -> Iterator[None]:
    """Warnings about what events do on purpose are not for the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
