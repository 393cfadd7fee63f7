"""Runs a program on ranks that are threads: every rank by the rule after every event, and all with one process's bits.

One program again, with everything that happens in it: ``python -m tests.faults.checker SEED``.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import time
import traceback
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.ranks import RankError, Ranks

from .. import threads
from ..equality.pieces import Pieces, assemble
from . import sharded, zero_played
from .expected import ByTheRule, Expected
from .played import Phase, Player, Whole, quietly
from .programs import Event, Program, Unit, program, simpler


class Wrong(AssertionError):
    """A program did not come to what the rule says. The message has the program, made smaller, and how to repeat it."""


def check(seed: int) -> None:
    """Raise Wrong where the program of a seed goes wrong."""
    fault = fault_of(program(seed))
    if fault is None:
        return
    smallest, fault = shrink(program(seed), fault)
    raise Wrong(
        f"{fault}\n{smallest}\nThis is what is left of program {seed}. Again: python -m tests.faults.checker {seed}"
    )


def fault_of(tried: Program) -> str | None:
    """What goes wrong in a program, None where nothing does."""
    try:
        with quietly():
            run(tried)
    except RankError as error:
        return str(error).split("\n\nrank ")[0]  # one rank's is enough
    except Exception:
        return traceback.format_exc()
    return None


def shrink(wrong: Program, fault: str) -> tuple[Program, str]:
    """A program with less in it that goes wrong in the same way, and how it does; the smallest found in a minute."""
    end = time.monotonic() + 60
    tries = simpler(wrong)
    while time.monotonic() < end and (tried := next(tries, None)) is not None:
        still = fault_of(tried)
        if still is not None and _errors(still) == _errors(fault):
            wrong, fault, tries = tried, still, simpler(tried)
    return wrong, fault


def _errors(fault: str) -> set[str]:
    return set(re.findall(r"\w*Error", fault))


def run(tried: Program) -> None:
    """Raise AssertionError or RankError where a rank sees something else than the rule, or holds other bits than one
    process."""
    units = [tried.on_island(i) for i in range(tried.islands)]
    traces = [[list(ByTheRule(unit).play()) for unit in island] for island in units]
    phases = [
        [_phases(unit, trace, tried.world) for unit, trace in zip(of_units, of_traces, strict=True)]
        for of_units, of_traces in zip(units, traces, strict=True)
    ]
    wholes = [[_start(unit) for unit in island] for island in units]
    for i in range(len(phases[0][0])):
        now = [[of_unit[i] for of_unit in island] for island in phases]
        if all(phase.regime == "alone" for phase in now[0]):
            held = [_on_rank(units, now, wholes, 0)]
        else:
            held = threads.run(now[0][0].world, _on_rank, units, now, wholes, tried.idle)
        size = (len(held) - tried.idle) // tried.islands
        for island, of_island in enumerate(units):
            of_units = zip(*held[island * size : (island + 1) * size], strict=True)
            wholes[island] = [_whole(unit, list(held)) for unit, held in zip(of_island, of_units, strict=True)]
    for of_island, of_traces, of_wholes in zip(units, traces, wholes, strict=True):
        for unit, trace, whole in zip(of_island, of_traces, of_wholes, strict=True):
            _compare_with_one_process(unit, trace, whole)


def check_zero(unit: Unit, ranks: Ranks) -> None:
    """Raise RankError where a rank under DeepSpeed sees something else than the rule."""
    ranks.run(zero_played.play, unit, list(ByTheRule(unit).play()), _start(unit)["param"])


def _start(unit: Unit) -> Whole:
    values = ByTheRule(unit).values
    return {"param": np.concatenate([values[name].reshape(-1) for name in unit.names]), "options": unit.options}


def _phases(unit: Unit, trace: list[Expected], world: int) -> list[Phase]:
    numbers, t = sorted(set(unit.group_of) - set(unit.late)), {}
    phases = [Phase(unit.regime, world, numbers, t)]
    for expected in trace:
        event = expected.event
        if event.what == "move":
            phases.append(Phase(event.of["regime"], event.of["world"], numbers, t))
        if event.what == "add":
            numbers = [*numbers, event.of["group"]]
        phases[-1].trace.append(expected)
        t = expected.t
    return phases


def _on_rank(
    units: list[tuple[Unit, ...]], phases: list[list[Phase]], wholes: list[list[Whole]], idle: int
) -> list[Any]:
    """The units of this rank's island, an event of each in turn; what the rank then holds of each."""
    on = sharded.ground(len(units), idle)
    if on is None:
        return []
    i = on.island
    players = [
        Player(unit, on, phase, whole) for unit, phase, whole in zip(units[i], phases[i], wholes[i], strict=True)
    ]
    for at_once in itertools.zip_longest(*(phase.trace for phase in phases[i])):
        for player, expected in zip(players, at_once, strict=True):
            if expected is not None:
                player.play(expected)
    return [player.held() for player in players]


def _whole(unit: Unit, held: list[tuple[Pieces, Whole]]) -> Whole:
    count = torch.Size([sum(math.prod(shape) for shape in unit.shapes)])
    flat = assemble([pieces for pieces, _ in held], dict.fromkeys(held[0][0], count))
    groups = {number: group for _, rest in reversed(held) for number, group in rest["groups"].items()}
    return {**held[0][1], "groups": groups, **{what: tensor.numpy() for what, tensor in flat.items()}}


def _compare_with_one_process(unit: Unit, trace: list[Expected], whole: Whole) -> None:
    """Play it again, whole and in one process. Only the order in which a norm is summed may make a difference."""
    here = Event("reload", {"through": "itself", "file": False})  # as a move is, where there is nowhere to go
    stays = [replace(expected, event=here) if expected.event.what == "move" else expected for expected in trace]
    (phase,) = _phases(replace(unit, regime="alone"), stays, 1)
    player = Player(unit, sharded.Ground(0, 0, 1, None, None), phase, _start(unit))
    for expected in stays:
        player.play(expected)
    alone = _whole(unit, [player.held()])
    for what in ("param", *player.moments):
        bits = np.array_equal(alone[what], whole[what])
        assert bits or unit.options["clip_norm"], f"{what}: not the bits of one process"


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        print(program(number))
        try:
            check(number)
        except Wrong as wrong:
            sys.exit(f"\n{wrong}")
