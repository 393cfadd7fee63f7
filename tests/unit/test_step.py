"""The step as backends drive it: which act may follow which, and that an unfinished one leaves no trace."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam, parameters
from alphaadam_dist.options import NAMES, FamilyOptions, Options
from alphaadam_dist.step import Step


def with_gradient(**options: Any) -> AlphaAdam:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([1.0, -1.0, 2.0])
    return AlphaAdam([param], lr=0.1, **options)


def opened(**options: Any) -> Step:
    optimizer = with_gradient(**options)
    return Step(optimizer, parameters.current_layout(optimizer))


@pytest.mark.parametrize(
    ("given", "acts", "wrong"),
    [
        ({}, [], "update() of a step that is opened: .* count() once"),
        ({}, [], "close() of a step that is opened"),
        ({}, ["count"], "count() of a step that is counted"),
        ({}, ["count", "update"], "count() of a step that is updated"),
        ({}, ["count", "update", "close"], "close() of a step that is closed"),
        ({}, ["count", "update", "close"], "update() of a step that is closed"),
        ({"sync": "delayed"}, [], "count() of a step that is opened: with sync='delayed' .* update(), close()"),
        ({"sync": "delayed"}, [], "close() of a step that is opened"),
        ({"sync": "delayed"}, ["update", "close"], "update() of a step that is closed"),
        ({"gamma": 1.0}, [], "count() of a step that is opened: .* gamma=1.0 .* update(), close()"),
        ({"gamma": 1.0, "clip_norm": 1.0}, [], "update() of a step that is opened: .* count() once"),
    ],
)
def test_an_act_out_of_order_is_an_error_that_names_it(given: dict[str, Any], acts: list[str], wrong: str) -> None:
    step = opened(**given)
    for act in acts:
        getattr(step, act)()
    assert not step.may(wrong.partition("(")[0])
    with pytest.raises(RuntimeError, match=wrong.replace("(", r"\(").replace(")", r"\)")):
        getattr(step, wrong.partition("(")[0])()


@pytest.mark.parametrize("sync", ["exact", "delayed"])
def test_the_acts_are_the_optimizers_step(sync: str) -> None:
    optimizer, other = with_gradient(sync=sync), with_gradient(sync=sync)
    for _ in range(3):
        optimizer.step()
        step = Step(other, parameters.current_layout(other))
        if sync == "exact":
            step.count()
        step.update()
        step.close()
    assert torch.equal(optimizer.param_groups[0]["params"][0], other.param_groups[0]["params"][0])
    assert optimizer.metrics() == other.metrics()


def test_a_step_that_is_only_opened_leaves_no_trace() -> None:
    optimizer = with_gradient()
    optimizer.step()
    before = optimizer.metrics()
    Step(optimizer, parameters.current_layout(optimizer))
    assert optimizer.metrics() == before


def test_type_checkers_see_the_options_as_they_are() -> None:
    assert tuple(get_type_hints(Options)) == NAMES
    assert get_type_hints(Options) == get_type_hints(FamilyOptions)


def test_options_that_a_user_changes_in_the_defaults_hold_from_the_next_step_and_are_checked() -> None:
    changed, expected = with_gradient(), with_gradient(gamma=1.0)
    for optimizer in (changed, expected):
        optimizer.defaults["gamma"] = optimizer.param_groups[0]["gamma"] = 1.0
        optimizer.step()
        optimizer.step()
    assert changed.metrics() == expected.metrics()
    changed.defaults["sync"] = changed.param_groups[0]["sync"] = "later"
    with pytest.raises(ValueError, match="sync='later' is unknown: give 'exact' or 'delayed'"):
        changed.step()
