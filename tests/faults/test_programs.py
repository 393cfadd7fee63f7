"""Whatever a program does, and over however many ranks: it is that of one process, and that is the rule.

A sample here, the same one every time; `make test-nightly` runs a thousand that are new every night.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from tests.ranks import Ranks

from .. import threads
from ..equality import pieces
from .programs import THREADED, Program, programs, run, run_rule, run_zero

COUNT = int(os.environ.get("PROGRAMS", "25"))
ZERO = COUNT // 5
NIGHTLY = COUNT > 25


def sample(count: int) -> Any:
    return settings(
        max_examples=count, deadline=None, derandomize=not NIGHTLY, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def check_alone(program: Program) -> tuple[list[Any], dict[str, Tensor]]:
    """What one process sees, after comparing it with the rule."""
    alone = run(program, alone=True)
    params = {name: values.view(shape) for (name, (_, values)), shape in
              zip(alone["params"].items(), program.shapes, strict=True)}  # fmt: skip
    counts, expected = run_rule(program)
    assert [seen[1:] for seen in alone["seen"]] == counts
    for name, param in params.items():
        # the kernels may fuse what the rule rounds; seven steps of lr 1e-2 at most
        torch.testing.assert_close(param, expected[name], rtol=1e-5, atol=1e-6)
    return alone["seen"], params


def check_ranks(program: Program, ranks: list[dict[str, Any]], seen: list[Any], params: dict[str, Tensor]) -> None:
    """Every rank saw what one process did, and holds its part of what that holds."""
    for result in ranks:
        for (alpha, *counts), (alpha_alone, *counts_alone) in zip(result["seen"], seen, strict=True):
            assert counts == counts_alone
            if isinstance(alpha, dict):  # of a pipeline stage, its own layers
                assert alpha == {key: alpha_alone[key] for key in alpha}
                assert alpha
            else:
                assert alpha == alpha_alone
    shapes = {name: param.shape for name, param in params.items()}
    whole = pieces.assemble([result["params"] for result in ranks], shapes)
    # the norm is a sum of floats, and their order is the ranks'
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if program.options["clip_norm"] else {"rtol": 0, "atol": 0}
    for name, param in params.items():
        torch.testing.assert_close(whole[name], param, **tolerance)


@pytest.mark.timeout(14400 if NIGHTLY else 300)
@sample(COUNT - ZERO)
@given(programs(THREADED, (1, 2, 3, 4)))
def test_any_sharding_is_one_process(program: Program) -> None:
    seen, params = check_alone(program)
    check_ranks(program, threads.run(program.world, run, program), seen, params)


@pytest.mark.slow
@pytest.mark.timeout(14400 if NIGHTLY else 300)
@sample(ZERO)
@given(program=programs(("zero0", "zero1", "zero2", "zero3"), (2,)))
def test_zero_is_one_process(ranks2: Ranks, program: Program) -> None:
    seen, params = check_alone(program)
    held = [(result["seen"], result["params"]) for result in ranks2.run(run_zero, program)]
    whole = {name: torch.arange(param.numel()) for name, param in params.items()}
    ranks = [{"seen": s, "params": {n: (whole[n], p.view(-1)) for n, p in masters.items()}} for s, masters in held]
    check_ranks(program, ranks, seen, params)
