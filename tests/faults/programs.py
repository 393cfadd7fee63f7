"""Random programs: optimizers over models of any shapes, sharded in any way, and what happens to them.

A program is data and follows from its seed alone; its printed form says all that there is to know of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

PLAIN = ("alone", "replicas", "by-hand", "stages")
WORLDS: dict[str, tuple[int, ...]] = {
    "alone": (1,),
    "replicas": (1, 2, 3, 4),
    "by-hand": (1, 2, 3, 4),
    "stages": (2, 3, 4),
    "dtensors": (1, 2, 3, 4),
    "fsdp2": (1, 2, 3, 4),
    "hsdp": (2, 4),
    "tp-fsdp2": (4,),
    "fsdp1-original": (2, 3, 4),
    "fsdp1-flat": (2, 3, 4),
    "fsdp1-hybrid": (4,),
}
"""The numbers of ranks that each way of sharding is played on."""
NEEDS_GROUP = ("stages", "fsdp1-original", "fsdp1-flat", "fsdp1-hybrid")
WHOLE_WORLD = ("alone", "hsdp", "tp-fsdp2", "fsdp1-hybrid")
"""What is not played on a part of the world."""

DAMAGES = ("a group more", "another's state", "no lr", "a negative lr", "a short alphaadam_state", "T is NaN")
"""What a state can have that must not be loaded."""


@dataclass(frozen=True)
class Event:
    """Something that happens: the name of a method of the rule's player and of the library's, and its arguments."""

    what: str
    of: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.what}({', '.join(f'{name}={value!r}' for name, value in self.of.items())})"


@dataclass(frozen=True)
class Unit:
    """One optimizer and its parameters p0, p1, ...

    ``group_of`` is the parameter group of each, ``hyper`` what each group is built with; the groups ``late`` come by
    an event. ``dtype`` "mixed" gives every other parameter float32. ``strided``: matrices lie by columns. ``wrapper``
    says how its imitation holds it.
    """

    seed: int
    regime: str
    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    group_of: tuple[int, ...]
    hyper: tuple[dict[str, Any], ...]
    late: tuple[int, ...]
    options: dict[str, Any]
    fused: bool | None
    verify_every: int
    named: bool
    with_group: bool
    tensor_lr: bool
    strided: bool
    wrapper: str
    events: tuple[Event, ...]

    @property
    def names(self) -> list[str]:
        return [f"p{i}" for i in range(len(self.shapes))]

    def dtype_of(self, name: str) -> str:
        if self.dtype == "mixed":
            return "float32" if int(name[1:]) % 2 else "float64"
        return self.dtype

    def lr(self, value: float) -> float:
        """A learning rate as the optimizer gets it: a tensor has the precision of its dtype."""
        if not self.tensor_lr or self.dtype != "float32":
            return value
        return float(np.float32(value))

    def __str__(self) -> str:
        told = {name: value for name, value in vars(self).items() if name not in ("events", "shapes", "group_of")}
        params = ", ".join(f"{n} {s} in {g}" for n, s, g in zip(self.names, self.shapes, self.group_of, strict=True))
        lines = [f"  {name} = {value!r}" for name, value in told.items()]
        return "\n".join([f"  parameters: {params}", *lines, *(f"    {event}" for event in self.events)])


@dataclass(frozen=True)
class Program:
    """Units that are stepped in turn on ``world`` ranks.

    These are ``islands`` equal parts with models of their own, and ``idle`` ranks that do something else.
    """

    seed: int
    world: int
    islands: int
    idle: int
    units: tuple[Unit, ...]

    def __str__(self) -> str:
        units = "\n  beside it\n".join(str(unit) for unit in self.units)
        return f"program {self.seed}: {self.world} ranks, {self.islands} islands, {self.idle} idle\n{units}"

    def on_island(self, island: int) -> tuple[Unit, ...]:
        """The units with the values and gradients of an island."""
        return tuple(replace(unit, seed=unit.seed + island) for unit in self.units)


def simpler(program: Program) -> Iterator[Program]:
    """Programs with one thing less, the largest steps first."""
    if len(program.units) > 1:
        for unit in program.units:
            yield replace(program, units=(unit,))
    for i, unit in enumerate(program.units):
        count = len(unit.events)
        size = count // 2
        while size:
            for start in range(0, count, size):
                fewer = unit.events[:start] + unit.events[start + size :]
                yield replace(program, units=(*program.units[:i], replace(unit, events=fewer), *program.units[i + 1 :]))
            size //= 2
        for name, plain in (
            ("lookahead", 0.0),
            ("clip_norm", None),
            ("threshold", 0.0),
            ("alpha_warmup", 0),
            ("maximize", False),
        ):
            if unit.options[name] != plain:
                tamer = replace(unit, options={**unit.options, name: plain})
                yield replace(program, units=(*program.units[:i], tamer, *program.units[i + 1 :]))


# ---- from a seed


def program(seed: int) -> Program:
    chance = random.Random(seed)
    islands, idle = chance.choice([(1, 0)] * 4 + [(2, 0), (2, 0), (1, 1)])
    part = islands + idle > 1  # of the world
    possible = [r for r in WORLDS if not (part and r in WHOLE_WORLD)]
    regime = chance.choice(possible)
    ranks = chance.choice([n for n in WORLDS[regime] if n * islands + idle <= 4])
    regimes = regime, chance.choice([r for r in possible if ranks in WORLDS[r] and r != "alone"])
    count = chance.choice([1, 1, 1, 2])
    moves = not part and count == 1 and chance.random() < 0.5
    units = tuple(_unit(chance, r, part, moves) for r in regimes[:count])
    return Program(seed, ranks * islands + idle, islands, idle, units)


def zero_program(seed: int) -> Unit:
    """One optimizer under DeepSpeed."""
    chance = random.Random(seed)
    stage, kind = chance.randint(0, 3), chance.choice(["AlphaAdam", "AlphaLion", "AlphaSGD"])
    bf16, offload = chance.random() < 0.3, stage > 0 and chance.random() < 0.3
    unit = Unit(
        seed=chance.randrange(2**32),
        regime=f"zero{stage}{'-bf16' * bf16}{'-offload' * offload}",
        kind=kind,
        dtype="float32",
        shapes=tuple(_shape(chance, free=False) for _ in range(4)),
        group_of=(0, 0, 1, 1),
        hyper=tuple(_hyper(chance, kind) for _ in range(2)),
        late=(1,) if stage == 0 and not bf16 and chance.random() < 0.5 else (),
        options=_options(chance, kind),
        fused=chance.choice([None, False, True]),
        verify_every=chance.choice([0, 1]),
        named=True,
        with_group=False,
        tensor_lr=False,
        strided=False,
        wrapper="attributes",
        events=(),
    )
    return replace(unit, events=tuple(_zero_events(chance, unit)))


def _zero_events(chance: random.Random, unit: Unit) -> Iterator[Event]:
    for i in range(chance.randint(3, 6)):
        if chance.random() < 0.2:
            yield Event("lr", {"group": chance.choice(unit.group_of), "value": _lr(chance)})
        if i == 1 and unit.late:
            yield Event("add", {"group": unit.late[0]})
        if chance.random() < 0.2:
            yield Event("reload", {"through": "itself", "file": True})
        step = _step(chance, unit, flat="zero0" in unit.regime)  # there DeepSpeed makes zeros of what is missing
        absent = step.of["absent"] if len(step.of["absent"]) < len(unit.names) else unit.names[1:]  # a loss needs some
        yield replace(step, of={**step.of, "absent": tuple(absent), "by": "step"})
        if chance.random() < 0.6:
            yield Event("look", {"through": "itself"})


def _unit(chance: random.Random, regime: str, part: bool, moves: bool) -> Unit:
    free = not moves and regime in (*PLAIN, "dtensors")  # what FSDP has no shard of is possible
    kind = chance.choice(["AlphaAdam", "AlphaAdam", "AlphaLion", "AlphaSGD"])
    count = chance.randint(1, 5)
    groups = 1 if regime == "fsdp1-flat" else chance.randint(1, 3)
    group_of = tuple(sorted(chance.randrange(groups) for _ in range(count)))
    used = sorted(set(group_of))
    late = used[-1:] if len(used) > 1 and regime != "stages" and chance.random() < 0.3 else []
    dtype = chance.choice(["float64", "float64", "float32", "mixed"])
    named = part or regime in NEEDS_GROUP or chance.random() < 0.7
    unit = Unit(
        seed=chance.randrange(2**32),
        regime=regime,
        kind=kind,
        dtype="float64" if dtype == "mixed" and not free else dtype,
        shapes=tuple(_shape(chance, free) for _ in range(count)),
        group_of=group_of,
        hyper=tuple(_hyper(chance, kind) for _ in range(groups)),
        late=tuple(late),
        options=_options(chance, kind),
        fused=chance.choice([None, False, True]),
        verify_every=chance.choice([0, 0, 1, 2]),
        named=named,
        with_group=part or regime in NEEDS_GROUP or (named and chance.random() < 0.3),
        tensor_lr=chance.random() < 0.25,
        strided=free and regime not in ("by-hand", "dtensors") and chance.random() < 0.2,
        wrapper=chance.choice(["attributes", "copied"]),
        events=(),
    )
    return replace(unit, events=tuple(_events(chance, unit, moves)))


def _shape(chance: random.Random, free: bool) -> tuple[int, ...]:
    if free and chance.random() < 0.1:
        return chance.choice([(), (0,), (3, 0)])
    return tuple(chance.randint(1, 9) for _ in range(chance.randint(1, 3)))


def _hyper(chance: random.Random, kind: str) -> dict[str, Any]:
    hyper: dict[str, Any] = {"lr": _lr(chance), "weight_decay": chance.choice([0.0, 0.1])}
    if kind == "AlphaSGD":
        return {**hyper, "momentum": chance.choice([0.5, 0.9]), "nesterov": chance.random() < 0.5}
    hyper["betas"] = chance.choice([(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.5, 0.99)])
    return {**hyper, "eps": chance.choice([1e-8, 1e-4])} if kind == "AlphaAdam" else hyper


def _lr(chance: random.Random) -> float:
    return chance.choice([0.0, 1e-3, 1e-2, 3e-2])


def _options(chance: random.Random, kind: str) -> dict[str, Any]:
    scope, sync = chance.choice([("global", "exact"), ("layer", "exact"), ("global", "delayed")])
    return {
        "gamma": chance.choice([0.0, 0.3, 1.0]),
        "alpha_max": chance.choice([1.2, 4.0, float("inf")]),
        "threshold": chance.choice([0.0, 0.0, 1 / 9, 1.0]),
        "alpha_warmup": chance.choice([0, 0, 1, 4]),
        "scope": scope,
        "sync": sync,
        "clip_norm": chance.choice([None, 1.0, 100.0]) if sync == "exact" else None,
        "maximize": chance.random() < 0.3,
        "lookahead": chance.choice([0.0, 0.0, 0.25, 2.0]) if kind == "AlphaAdam" else 0.0,
    }


def _events(chance: random.Random, unit: Unit, moves: bool) -> Iterator[Event]:
    """What happens, in order; ``regime`` and the rest follow what that makes of the unit."""
    regime, frozen, saved = unit.regime, set[str](), False
    add_at = chance.randint(1, 3) if unit.late else None
    steps = chance.randint(3, 8)
    for step in range(steps):
        flat = regime == "fsdp1-flat"
        if chance.random() < 0.15:
            yield Event("lr", {"group": chance.choice(unit.group_of), "value": _lr(chance)})
        if chance.random() < 0.1:
            yield Event("schedule", {"factor": chance.choice([0.5, 2.0])})
        if chance.random() < 0.1:
            name, value = chance.choice([*_hyper(chance, unit.kind).items()][1:])
            yield Event("set", {"group": chance.choice(unit.group_of), "name": name, "value": value})
        if not flat and chance.random() < 0.15:
            name = chance.choice(unit.names)
            yield Event("thaw" if name in frozen else "freeze", {"name": name})
            frozen ^= {name}
        if step == add_at:
            yield Event("add", {"group": unit.late[0]})
            saved = False
        if chance.random() < 0.3:
            yield from _around(chance, unit, regime, saved)
        if regime in (*PLAIN, "dtensors") and chance.random() < 0.05:
            yield Event("swap")
        if chance.random() < 0.1:
            yield Event("damaged", {"what": chance.choice(DAMAGES)})
        if chance.random() < 0.1:
            yield Event("save")
            saved = True
        if moves and not flat and chance.random() < 0.2 and (add_at is None or step > add_at):
            others = [r for r in WORLDS if r != "fsdp1-flat" and (unit.named or r not in NEEDS_GROUP)]
            regime, saved = chance.choice(others), False
            yield Event("move", {"regime": regime, "world": chance.choice(WORLDS[regime])})
        yield _step(chance, unit, flat)
        if chance.random() < 0.6:
            yield Event("look", {"through": chance.choice(["itself", "wrapper"])})


def _around(chance: random.Random, unit: Unit, regime: str, saved: bool) -> Iterator[Event]:
    """Something that makes an optimizer of the one that is there."""
    what = chance.choice(["copy", "reload", "reload", "retune", "torch", *["rewind"] * saved])
    if what == "copy":
        yield Event("copy", {"how": chance.choice(["copy", "deepcopy", *["pickle"] * (regime in PLAIN)])})
    elif what == "reload":
        yield Event("reload", {"through": chance.choice(["itself", "wrapper"]), "file": regime in PLAIN})
    elif what == "retune":
        other_sync = ["sync"] * (unit.options["scope"] == "global" and unit.options["clip_norm"] is None)
        changed = chance.choice(
            ["gamma", "lookahead", "alpha_max", "threshold", "alpha_warmup", "maximize", *other_sync]
        )
        value = chance.choice(["exact", "delayed"]) if changed == "sync" else _options(chance, unit.kind)[changed]
        yield Event("retune", {"name": changed, "value": value})
    elif what == "torch" and unit.kind != "AlphaLion":
        yield Event("torch")
    elif what == "rewind":
        yield Event("rewind", {"into": chance.choice(["itself", "another"])})


def _step(chance: random.Random, unit: Unit, flat: bool) -> Event:
    absent = chance.choice([0.0, 0.0, 0.3, 1.0 if chance.random() < 0.3 else 0.0])
    zero = chance.choice([0.0, 0.0, 0.3, 1.0 if chance.random() < 0.5 else 0.0])
    return Event("step", {
        "salt": chance.randrange(2**32),
        "absent": () if flat else tuple(n for n in unit.names if chance.random() < absent),
        "zero": tuple(n for n in unit.names if chance.random() < zero),
        "sparse": chance.choice([0.0, 0.1, 0.7]),
        "by": chance.choice(["step", "closure", "wrapper"]),
    })  # fmt: skip
