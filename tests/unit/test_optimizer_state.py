"""Checkpoints, copies and pickles: what was saved goes on with the same bits, from AdamW and to it as well."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict

from alphaadam_dist import AlphaAdam

from .problems import Twin, gradients, memory_of, parameters_of, same_bits, step_with, tensors

MODES: dict[str, dict[str, Any]] = {
    "global": {},
    "layer": {"scope": "layer"},
    "delayed": {"sync": "delayed"},
    "warming": {"sync": "delayed", "alpha_warmup": 9, "gamma": 0.2},
    "clipped": {"clip_norm": 1.0, "threshold": 0.1},
}
modes = pytest.mark.parametrize("mode", MODES)
STEPS = gradients(10, absent=0.2)
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)}


def new(mode: str, params: list[Tensor] | None = None, **options: Any) -> AlphaAdam:
    copies = [nn.Parameter(p.detach().clone()) for p in params or tensors(0)]
    groups: list[dict[str, Any]] = [{"params": copies[:2], "lr": 3e-3}, {"params": copies[2:]}]
    return AlphaAdam(groups, **{**HYPER, **MODES[mode], **options})


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    for p, q in zip(parameters_of(a), parameters_of(b), strict=True):
        if not same_bits(p, q) or set(a.state[p]) != set(b.state[q]):
            return False
        if not all(same_bits(a.state[p][key], b.state[q][key]) for key in a.state[p]):
            return False
    return not (isinstance(a, AlphaAdam) and isinstance(b, AlphaAdam)) or memory_of(a) == memory_of(b)


def saved_to_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


# ---- the same run, interrupted


@modes
@pytest.mark.parametrize("through", [saved_to_file, copy.deepcopy])
def test_a_loaded_checkpoint_goes_on_bitwise(mode: str, through: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    whole, first = new(mode), new(mode)
    for grads in STEPS[:5]:
        step_with(whole, grads)
        step_with(first, grads)
    state = through(first.state_dict())
    second = new(mode, [p.detach() for p in parameters_of(first)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(state)
    assert memory_of(second) == memory_of(whole) != [0.0, 1.0, 0.0, 0.0]
    assert second.agreement["conflict"] == whole.agreement["conflict"]
    for grads in STEPS[5:]:
        step_with(whole, grads)
        step_with(second, grads)
    assert same(whole, second)


@modes
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_bitwise_and_apart(mode: str, how: Callable[[AlphaAdam], AlphaAdam]) -> None:
    whole, first = new(mode), new(mode)
    for grads in STEPS[:5]:
        step_with(whole, grads)
        step_with(first, grads)
    second = how(first)
    before = memory_of(first), [p.detach().clone() for p in parameters_of(first)]
    assert second.alpha == first.alpha or mode == "layer"  # alphas by layer start at 1, as after loading
    assert (second.sharding, second.defaults) == (first.sharding, first.defaults)
    for grads in STEPS[5:]:
        step_with(whole, grads)
        step_with(second, grads)
    assert same(whole, second)
    assert memory_of(first) == before[0]
    assert all(same_bits(p, q) for p, q in zip(parameters_of(first), before[1], strict=True))


@modes
def test_taking_a_state_dict_changes_nothing(mode: str) -> None:
    watched, left_alone = new(mode), new(mode)
    for grads in STEPS:
        step_with(watched, grads)
        step_with(left_alone, grads)
        watched.state_dict()
        _ = watched.alpha, watched.agreement
    assert same(watched, left_alone)


@modes
def test_a_run_rolled_back_to_its_own_checkpoint_repeats_itself(mode: str) -> None:
    """The optimizer that loads has run on since: none of its later statistics may stay."""
    optimizer = new(mode)
    for grads in STEPS[:4]:
        step_with(optimizer, grads)
    state, params = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters_of(optimizer)]
    ends = []
    for _ in range(2):
        for grads in STEPS[4:]:
            step_with(optimizer, grads)
        ends.append((memory_of(optimizer), [p.detach().clone() for p in parameters_of(optimizer)]))
        optimizer.load_state_dict(copy.deepcopy(state))
        for p, value in zip(parameters_of(optimizer), params, strict=True):
            p.data.copy_(value)
    assert ends[0][0] == ends[1][0]
    assert all(same_bits(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


@modes
def test_a_checkpoint_from_before_the_first_step_starts_anew(mode: str) -> None:
    optimizer = new(mode)
    start, params = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters_of(optimizer)]
    for grads in STEPS[:4]:
        step_with(optimizer, grads)
    optimizer.load_state_dict(start)
    assert memory_of(optimizer) == [0.0, 1.0, 0.0, 0.0]
    for p, value in zip(parameters_of(optimizer), params, strict=True):
        p.data.copy_(value)
    fresh = new(mode)
    for grads in STEPS:
        step_with(optimizer, grads)
        step_with(fresh, grads)
    assert same(optimizer, fresh)


# ---- AdamW


def adamw(params: list[Tensor] | None = None, **options: Any) -> torch.optim.AdamW:
    copies = [nn.Parameter(p.detach().clone()) for p in params or tensors(0)]
    groups: list[dict[str, Any]] = [{"params": copies[:2], "lr": 3e-3}, {"params": copies[2:]}]
    return torch.optim.AdamW(groups, **{**HYPER, "foreach": False, **options})


@pytest.mark.parametrize("mode", ["global", "layer", "delayed"])
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True, "foreach": None}])
def test_a_checkpoint_of_adamw_goes_on_as_adamw_with_gamma_one(mode: str, kind: dict[str, Any]) -> None:
    theirs = adamw(**kind)
    for grads in STEPS[:5]:
        step_with(theirs, grads)
    params = [p.detach() for p in parameters_of(theirs)]
    ours, reference = new(mode, params, gamma=1.0), adamw(params)
    state = saved_to_file(theirs.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(copy.deepcopy(state))
    state["param_groups"] = reference.state_dict()["param_groups"]  # neither fused nor foreach
    reference.load_state_dict(state)
    assert memory_of(ours) == [0.0, 1.0, 0.0, 0.0]
    for grads in STEPS[5:]:
        step_with(ours, grads)
        step_with(reference, grads)
    assert same(ours, reference)
    assert [group["fused"] for group in ours.param_groups] == [None, None]
    assert all(group["alphaadam_state"][0] == 5.0 for group in ours.state_dict()["param_groups"])


@pytest.mark.parametrize("mode", ["global", "layer", "delayed"])
def test_a_checkpoint_of_alphaadam_goes_on_in_adamw(mode: str) -> None:
    ours = new(mode, gamma=1.0)
    for grads in STEPS[:5]:
        step_with(ours, grads)
    theirs = adamw([p.detach() for p in parameters_of(ours)])
    theirs.load_state_dict(saved_to_file(ours.state_dict()))
    for grads in STEPS[5:]:
        step_with(ours, grads)
        step_with(theirs, grads)
    assert same(ours, theirs)


def test_a_checkpoint_of_adamw_loaded_into_a_running_optimizer_forgets_its_statistics() -> None:
    """There is no alphaadam_state in it, so T, alpha, A and C are those of a run that has not begun."""
    ours = new("delayed", alpha_warmup=20)
    for grads in STEPS[:5]:
        step_with(ours, grads)  # no state_dict, alpha or agreement was read in between
    ours.load_state_dict(adamw().state_dict())
    assert memory_of(ours) == [0.0, 1.0, 0.0, 0.0]


def test_amsgrad_checkpoints_are_refused() -> None:
    theirs = adamw(amsgrad=True)
    step_with(theirs, STEPS[0])
    with pytest.raises(ValueError, match=r"amsgrad=True.*AlphaAdam"):
        new("global").load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("written", "now"),
    [
        ({"gamma": 0.5}, {"gamma": 0.0}),
        ({"lookahead": 0.5}, {"lookahead": 0.25}),
        ({}, {"gamma": 1.0}),
        ({"threshold": 0.1}, {}),
        ({"alpha_max": 2.0}, {}),
        ({"scope": "layer"}, {}),
        ({"sync": "delayed"}, {}),
        ({"clip_norm": 1.0}, {"clip_norm": None}),
        ({"maximize": True}, {}),
        ({}, {"alpha_warmup": 7}),
    ],
    ids=str,
)
def test_another_option_in_the_checkpoint_warns_and_the_constructor_wins(
    written: dict[str, Any], now: dict[str, Any]
) -> None:
    first = new("global", **written)
    step_with(first, STEPS[0])
    second = new("global", [p.detach() for p in parameters_of(first)], **now)
    name = next(iter({**written, **now}))
    with pytest.warns(UserWarning, match=rf"written with {name}=.*going on with {name}=") as seen:
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert len(seen) == 1
    assert all(group[name] == second.defaults[name] for group in second.param_groups)
    before = [p.detach().clone() for p in parameters_of(second)]
    step_with(second, STEPS[1])
    beside = new("global", before, **now)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        beside.load_state_dict(copy.deepcopy(first.state_dict()))
    step_with(beside, STEPS[1])
    assert same(second, beside)


def test_a_run_goes_on_with_a_smaller_alpha_max_and_is_saved_before_its_next_step() -> None:
    first, capped, again = new("global"), new("global", alpha_max=1.05), new("global", alpha_max=1.05)
    for grads in STEPS[:4]:
        step_with(first, grads)
    assert first.metrics()["alpha"] > 1.05
    with pytest.warns(UserWarning, match=r"alpha_max=4.0; going on with alpha_max=1.05"):
        capped.load_state_dict(first.state_dict())
    again.load_state_dict(capped.state_dict())
    assert memory_of(again) == memory_of(first)


def test_a_loaded_learning_rate_wins_as_in_every_torch_optimizer() -> None:
    first = new("global")
    second = AlphaAdam([{"params": g["params"]} for g in new("global").param_groups], lr=0.5, betas=(0.5, 0.5))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [(g["lr"], g["betas"]) for g in second.param_groups] == [(3e-3, (0.9, 0.99)), (1e-2, (0.9, 0.99))]


def test_a_checkpoint_of_other_groups_is_refused_and_nothing_is_loaded() -> None:
    first, second = new("global"), AlphaAdam([nn.Parameter(p) for p in tensors(0)], **HYPER)
    step_with(first, STEPS[0])
    with pytest.raises(ValueError, match=r"2 parameter groups, this optimizer has 1"):
        second.load_state_dict(first.state_dict())
    assert not second.state
    assert memory_of(second) == [0.0, 1.0, 0.0, 0.0]


def test_groups_added_later_carry_the_state_too() -> None:
    optimizer = new("global")
    for grads in STEPS[:3]:
        step_with(optimizer, grads)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    states = [group["alphaadam_state"] for group in optimizer.state_dict()["param_groups"]]
    assert states == [memory_of(optimizer)] * 3
    assert all(isinstance(x, float) for state in states for x in state)


# ---- torch.distributed.checkpoint's phantom step


@pytest.mark.parametrize("mode", ["global", "layer", "delayed", "warming"])
def test_the_phantom_step_of_distributed_checkpoints_does_not_count(mode: str) -> None:
    """_init_optim_state steps with zero gradients and lr 0, so that there is a state to load into."""
    first = new(mode)
    for grads in STEPS[:5]:
        step_with(first, grads)
    state, params = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in parameters_of(first)]
    second = new(mode, params)
    dcp_state_dict._init_optim_state(second)
    assert memory_of(second) == [0.0, 1.0, 0.0, 0.0]
    assert all(float(second.state[p]["step"]) == 1.0 for p in parameters_of(second))
    assert all(same_bits(p, q) for p, q in zip(parameters_of(second), params, strict=True))
    second.load_state_dict(state)
    for grads in STEPS[5:]:
        step_with(first, grads)
        step_with(second, grads)
    assert same(first, second)


def test_a_phantom_step_in_the_middle_of_a_run_keeps_the_pending_counts() -> None:
    twin = Twin([{"params": tensors(0)}], sync="delayed")
    for grads in STEPS[:4]:
        twin.step(grads)
    before = memory_of(twin.optimizer)
    for p in parameters_of(twin.optimizer):
        p.grad = None
    twin.optimizer.param_groups[0]["lr"] = 0.0
    twin.step([torch.zeros_like(p) for p in parameters_of(twin.optimizer)])
    assert memory_of(twin.optimizer) == before
    twin.optimizer.param_groups[0]["lr"] = 1e-3
    for grads in STEPS[4:]:
        twin.step(grads)
    assert twin.differences() == []
    assert before[3] > 0


def test_distributed_checkpoint_state_dicts_round_trip() -> None:
    """get_optimizer_state_dict and its counterpart, which flatten by name, in one process."""
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (AlphaAdam(model.named_parameters(), sync="delayed", lr=1e-2) for model in models)
    steps = gradients(6, shapes=[tuple(p.shape) for p in models[0].parameters()])
    for grads in steps[:4]:
        step_with(first, grads)
    state = copy.deepcopy(dcp_state_dict.get_optimizer_state_dict(models[0], first))
    models[1].load_state_dict(models[0].state_dict())
    dcp_state_dict.set_optimizer_state_dict(models[1], second, state)
    for grads in steps[4:]:
        step_with(first, grads)
        step_with(second, grads)
    assert same(first, second)


def sharing_a_step(groups: int) -> tuple[AlphaAdam, list[torch.nn.Parameter], torch.Tensor]:
    """An optimizer whose two parameters, in so many groups, have one step between them, at 3."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(2)
    optimizer = AlphaAdam(params if groups == 1 else [{"params": [param]} for param in params])
    optimizer.step()
    shared = torch.tensor(3.0)
    for param in params:
        optimizer.state[param]["step"] = shared
    return optimizer, params, shared


@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_that_share_a_step_are_parted(groups: int) -> None:
    """DeepSpeed steps part by part, and its universal load at stage 3 makes all parts share a step."""
    optimizer, params, shared = sharing_a_step(groups)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [4, 4]
    assert float(shared) == 3


def test_parameters_whose_checkpoint_shares_a_step_get_one_each() -> None:
    """DeepSpeed's universal load of stage 3 shares it; a step counted up in place would count for all of them."""
    optimizer, params, _ = sharing_a_step(1)
    optimizer.__setstate__({})
    first, second = (optimizer.state[param]["step"] for param in params)
    assert (float(first), float(second)) == (3, 3)
    assert first.data_ptr() != second.data_ptr()
