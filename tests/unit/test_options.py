"""Every option that cannot be: refused at once, naming the field, the value and the way out."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam

from .problems import step_with


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]


NAN, INF = math.nan, math.inf
BAD: list[tuple[dict[str, Any], str, str]] = [
    # options, "field=value" in the message, a word of the fix
    *[({"lr": v}, f"lr={v!r}", "0 or more") for v in (-1e-3, -INF, INF, NAN, "1e-3", None, True, [1e-3])],
    ({"lr": torch.tensor(-1.0)}, "lr=-1.0", "0 or more"),
    ({"lr": torch.tensor(NAN)}, "lr=nan", "0 or more"),
    ({"lr": torch.ones(2)}, "lr is a tensor of shape (2,)", "one element"),
    ({"lr": torch.ones(0)}, "lr is a tensor of shape (0,)", "one element"),
    *[({"eps": v}, f"eps={v!r}", "0 or more") for v in (-1e-8, NAN, INF, "0")],
    *[({"weight_decay": v}, f"weight_decay={v!r}", "0 or more") for v in (-0.1, NAN, INF, None)],
    ({"betas": (0.9,)}, "betas=(0.9,)", "two numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, "betas=(0.9, 0.99, 0.999)", "two numbers"),
    ({"betas": 0.9}, "betas=0.9", "two numbers"),
    ({"betas": None}, "betas=None", "two numbers"),
    ({"betas": (1.0, 0.999)}, "betas[0]=1.0", "less than 1"),
    ({"betas": (-0.1, 0.999)}, "betas[0]=-0.1", "at least 0"),
    ({"betas": (0.9, 1.0)}, "betas[1]=1.0", "less than 1"),
    ({"betas": (0.9, NAN)}, "betas[1]=nan", "less than 1"),
    ({"betas": (0.9, "0.999")}, "betas[1]='0.999'", "number"),
    *[({"gamma": v}, f"gamma={v!r}", "between 0") for v in (-0.1, 1.1, NAN, INF, "0", None)],
    *[({"alpha_max": v}, f"alpha_max={v!r}", "1 or more") for v in (0.9, 0, -4.0, NAN, -INF, None)],
    *[({"threshold": v}, f"threshold={v!r}", "0 or more") for v in (-0.1, NAN, INF, "0.1", None)],
    *[({"alpha_warmup": v}, f"alpha_warmup={v!r}", "number of steps") for v in (-1, NAN, INF, "10", None)],
    *[({"scope": v}, f"scope={v!r}", "'global' or 'layer'") for v in ("model", "Global", None, 3)],
    *[({"sync": v}, f"sync={v!r}", "'exact' or 'delayed'") for v in ("async", "", None, True)],
    *[({"sharding": v}, f"sharding={v!r}", "'replicated' or 'sharded'") for v in ("fsdp", None, 1)],
    *[({"clip_norm": v}, f"clip_norm={v!r}", "more than 0") for v in (0, 0.0, -1.0, NAN, INF, "1")],
    ({"sync": "delayed", "scope": "layer"}, "sync='delayed' with scope='layer'", "scope='global'"),
    ({"sync": "delayed", "clip_norm": 1.0}, "sync='delayed' with clip_norm=1.0", "sync='exact'"),
    ({"fused": "yes"}, "fused='yes'", "None"),
    ({"capturable": True}, "capturable=True", "a GPU"),
    ({"capturable": 1}, "capturable=1", "True or False"),
    ({"capturable": True, "sync": "delayed"}, "capturable=True", "sync='exact'"),
    ({"capturable": True, "fused": False}, "fused=False", "fused=None"),
    ({"capturable": True, "verify_every": 5}, "verify_every=5", "verify_every=0"),
]


@pytest.mark.parametrize(("options", "named", "fix"), BAD, ids=[str(options) for options, _, _ in BAD])
def test_bad_options_are_refused_at_construction(options: dict[str, Any], named: str, fix: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        AlphaAdam(params(), **options)
    assert fix in str(refusal.value)


PER_GROUP = [(o, n, f) for o, n, f in BAD if next(iter(o)) in ("lr", "eps", "weight_decay", "betas")]


@pytest.mark.parametrize(("options", "named", "fix"), PER_GROUP, ids=[str(options) for options, _, _ in PER_GROUP])
def test_bad_hyperparameters_of_a_group_are_refused_and_nothing_is_added(
    options: dict[str, Any], named: str, fix: str
) -> None:
    first, second = params()
    with pytest.raises(ValueError, match=re.escape(named)):
        AlphaAdam([{"params": [first]}, {"params": [second], **options}])
    optimizer = AlphaAdam([first])
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        optimizer.add_param_group({"params": [second], **options})
    assert fix in str(refusal.value)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second]})
    step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0}, {"lr": 1}, {"lr": torch.tensor(1e-3)}, {"lr": torch.tensor([1e-3])}, {"lr": np.float64(1e-3)},
        {"eps": 0}, {"weight_decay": 0}, {"betas": (0, 0)}, {"betas": [0.9, 0.999]},
        {"gamma": 0}, {"gamma": 1}, {"alpha_max": 1}, {"alpha_max": INF}, {"threshold": 10.0}, {"alpha_warmup": 100},
        {"clip_norm": 1e-300}, {"fused": None}, {"fused": False}, {"fused": True}, {"capturable": False},
        {"sharding": "replicated"},
    ],
    ids=str,
)  # fmt: skip
def test_options_at_their_bounds_are_taken(options: dict[str, Any]) -> None:
    optimizer = AlphaAdam(params(), **options)
    step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])
    assert optimizer.alpha == 1.0


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gama", "gamma"), ("learning_rate", None), ("weigth_decay", "weight_decay"), ("alphamax", "alpha_max"),
        ("thresh", "threshold"), ("clipnorm", "clip_norm"), ("amsgrad", None), ("foreach", None),
    ],
)  # fmt: skip
def test_unknown_options_are_refused_with_the_nearest_known_one(name: str, near: str | None) -> None:
    wrong: dict[str, Any] = {name: 0.5}
    with pytest.raises(TypeError, match=rf"AlphaAdam has no option '{name}' \(=0\.5\)") as refusal:
        AlphaAdam(params(), **wrong)
    message = str(refusal.value)
    assert "Options: " in message
    assert "gamma" in message
    assert (f"did you mean {near!r}?" if near else ": ") in message
    for internal in ("self", "params", "unknown", "alphaadam_state"):
        assert internal not in message.split("Options: ")[1].split(", ")


SHARED: dict[str, Any] = {
    "gamma": 0.5, "alpha_max": 2.0, "threshold": 0.1, "alpha_warmup": 3, "scope": "layer", "sync": "delayed",
    "clip_norm": 1.0, "maximize": True, "capturable": True,
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_a_group_that_contradicts_an_option_of_the_whole_optimizer(name: str) -> None:
    first, second = params()
    said = re.escape(f"{name}={SHARED[name]!r}") + r" in parameter group 1 contradicts " + name
    with pytest.raises(ValueError, match=said) as refusal:
        AlphaAdam([{"params": [first]}, {"params": [second], name: SHARED[name]}])
    assert "give it to AlphaAdam(...)" in str(refusal.value)

    optimizer = AlphaAdam([first])
    with pytest.raises(ValueError, match=said):
        optimizer.add_param_group({"params": [second], name: SHARED[name]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second], name: optimizer.defaults[name]})  # saying the same is no harm

    optimizer.param_groups[1][name] = SHARED[name]
    before = [p.detach().clone() for p in (first, second)]
    with pytest.raises(ValueError, match=said):
        step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])
    assert all(torch.equal(a, b) for a, b in zip(before, (first, second), strict=True))
    assert not optimizer.state
    optimizer.param_groups[1][name] = optimizer.defaults[name]
    step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])
    assert optimizer.agreement["agree"] == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("fused", True), ("amsgrad", True), ("sharding", "sharded"), ("decoupled_weight_decay", False)],
)
def test_what_no_group_can_ask_for_is_refused_rather_than_ignored(name: str, value: Any) -> None:
    first, second = params()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        AlphaAdam([{"params": [first]}, {"params": [second], name: value}])


def test_defaults_are_those_of_the_design() -> None:
    expected = {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "gamma": 0.0, "alpha_max": 4.0,
        "threshold": 0.0, "alpha_warmup": 0, "scope": "global", "sync": "exact", "clip_norm": None, "fused": None,
        "capturable": False, "maximize": False,
    }  # fmt: skip
    optimizer = AlphaAdam(params())
    assert {name: optimizer.defaults[name] for name in expected} == expected
    assert (optimizer.sharding, optimizer.process_group) == ("auto", None)
    positional = AlphaAdam(params(), 2e-3, (0.8, 0.9), 1e-6, 0.3).defaults
    assert [positional[n] for n in ("lr", "betas", "eps", "weight_decay")] == [2e-3, (0.8, 0.9), 1e-6, 0.3]


def test_sharded_without_a_process_group_is_refused_at_construction_with_the_way_out() -> None:
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match=r"sharding='sharded'.*init_process_group"):
        AlphaAdam(params(), sharding="sharded")
