"""The agreement of each parameter group is that of one process under any sharding, and together they are the step's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam, parameter_groups, rule
from tests.models import Given, given_gradients

from .. import threads
from ..marks import slow_but
from . import given
from .test_given import FAST, NOT_BY_NAME

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "threshold": {"threshold": 0.1, "maximize": True, "fused": True},
    "bf16 state": {"state_dtype": "bfloat16"},
}


def run(regime: str, options: dict[str, Any]) -> list[list[dict[str, float]]]:
    _, shard, extra = given.REGIMES[regime]
    model = shard(Given())
    optimizer = AlphaAdam(parameter_groups(model, given.GROUPS), lr=given.LR, **options, **extra())
    seen = []
    for gradients in given_gradients(5):
        given.give(model, gradients)
        with threads.Collectives() as counted:
            seen.append(optimizer.agreement_by_group())
        assert len(counted.seen) <= 1 or len(seen) == 1, "one all-reduce, once the layout is there"
        assert seen[-1] == optimizer.agreement_by_group(), "asking changes nothing"
        optimizer.step()
        optimizer.zero_grad()
        for kind in ("agree", "conflict"):
            assert sum(group[kind] for group in seen[-1]) == optimizer.agreement[kind]
    return seen


@cache
def alone(setting: str) -> list[list[dict[str, float]]]:
    (seen,) = threads.run(1, run, "plain", OPTIONS[setting])
    return seen  # type: ignore[no-any-return]


@pytest.mark.parametrize("setting", OPTIONS)
@pytest.mark.parametrize("regime", slow_but([name for name in given.REGIMES if name not in NOT_BY_NAME], *FAST))
def test_any_sharding_is_one_process(regime: str, setting: str) -> None:
    if setting == "bf16 state" and regime in ("fsdp1-original", "by-hand"):
        pytest.skip("bf16 state is refused here: nobody knows where the elements stand")
    ranks = threads.run(given.REGIMES[regime][0], run, regime, OPTIONS[setting])
    assert all(seen == alone(setting) for seen in ranks)
    assert len({group["agreement"] for group in alone(setting)[-1]}) == 3, "else the groups would show nothing"


def test_it_is_the_rules_masks() -> None:
    first, second = nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(7))
    optimizer = AlphaAdam([{"params": [first]}, {"params": [second]}], lr=0.1)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        first.grad, second.grad = torch.randn(40, generator=generator), None
        seen = optimizer.agreement_by_group()
        momentum = optimizer.state[first]["exp_avg"] if seed else torch.zeros(40)
        agree, conflict = rule.classify(first.grad, momentum)
        agreeing, conflicting = int(agree.sum()), int(conflict.sum())
        assert seen[0] == {"agree": agreeing, "conflict": conflicting, "agreement": agreeing / 40}
        assert seen[1] == {"agree": 0, "conflict": 0, "agreement": 1.0}
        assert bool(optimizer.state) == (seed > 0), "asking makes no state"
        optimizer.step()


def test_where_it_cannot_be_told() -> None:
    model = nn.Linear(2, 2)
    optimizer = AlphaAdam(model.parameters(), sync="delayed")
    handle = optimizer.step_in_backward(model)
    with pytest.raises(ValueError, match=r"with step_in_backward.*read metrics\(\)"):
        optimizer.agreement_by_group()
    handle.remove()
    optimizer.agreement_by_group()
    with pytest.raises(ValueError, match=r"clip_norm=1.0 and threshold=0.1"):
        AlphaAdam(model.parameters(), clip_norm=1.0, threshold=0.1).agreement_by_group()
