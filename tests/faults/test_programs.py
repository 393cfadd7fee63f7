"""Whatever a program does, under any sharding: every rank is by the rule of docs/algorithm.md, and one process's bits.

The programs of ``SEED`` and the ``PROGRAMS`` - 1 seeds after it; ``make test-nightly`` takes a thousand new ones.
"""

from __future__ import annotations

import os

import pytest

from tests.ranks import RankError, Ranks

from . import checker
from .programs import zero_program

SEED = int(os.environ.get("SEED", "0"))
PROGRAMS = int(os.environ.get("PROGRAMS", "100"))
SEEDS = range(SEED, SEED + PROGRAMS)
FAST = 20


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] * (s >= SEED + FAST)) for s in SEEDS])
def test_a_program_is_by_the_rule(seed: int) -> None:
    checker.check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS[: max(1, PROGRAMS // 20)])
def test_a_program_under_zero_is_by_the_rule(ranks2: Ranks, seed: int) -> None:
    try:
        checker.check_zero(zero_program(seed), ranks2)
    except RankError as error:
        pytest.fail(f"{error}\n{zero_program(seed)}\nAgain: SEED={seed} PROGRAMS=1 make test-nightly")
