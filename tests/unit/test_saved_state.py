"""States that cannot be gone on with: refused with field, value and fix, and nothing has changed."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer

from .. import threads
from .problems import gradients, memory_of, parameters_of, same_bits, step_with, tensors

NAN, INF = math.nan, math.inf
SHAPES = [(4, 3), (5,), ()]
STEPS = gradients(8, shapes=SHAPES)
Change = Callable[[dict[str, Any]], None]


def new(kind: type[AlphaOptimizer] = AlphaAdam, **options: Any) -> AlphaOptimizer:
    first, *rest = [nn.Parameter(p) for p in tensors(0, shapes=SHAPES)]
    return kind([{"params": [first]}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, **options)  # type: ignore[call-arg]


def trained(kind: type[AlphaOptimizer] = AlphaAdam, steps: int = 4, **options: Any) -> AlphaOptimizer:
    optimizer = new(kind, **options)
    for grads in STEPS[:steps]:
        step_with(optimizer, grads)
    return optimizer


def snapshot(optimizer: AlphaOptimizer) -> str:
    """All that a load could change: statistics, groups, state, defaults. Equal exactly when the bits are."""
    held = memory_of(optimizer), optimizer.alpha, optimizer.defaults
    params = parameters_of(optimizer)
    numbers = {id(param): i for i, param in enumerate(params)}
    groups = [{**group, "params": [numbers[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    state = [{name: (v.dtype, v.tolist()) for name, v in optimizer.state.get(p, {}).items()} for p in params]
    return repr((held, groups, state, len(optimizer.state)))


def in_groups(**values: Any) -> Change:
    return lambda saved: [group.update(copy.deepcopy(values)) for group in saved["param_groups"]] and None


def in_group(i: int, **values: Any) -> Change:
    return lambda saved: saved["param_groups"][i].update(values)


def without(*path: Any) -> Change:
    def change(saved: dict[str, Any]) -> None:
        held: Any = saved
        for step in path[:-1]:
            held = held[step]
        del held[path[-1]]

    return change


def in_state(i: int, **values: Any) -> Change:
    return lambda saved: saved["state"][i].update(values)


def swap_states(saved: dict[str, Any]) -> None:
    state = saved["state"]
    state[0], state[1] = state[1], state[0]


def negate_squares(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg_sq"][2] = -1e-30


STATISTICS: list[Any] = [
    None, [], [1.0], [4.0, 1.5, 3.0], [4.0, 1.5, 3.0, 2.0, 1.0], [NAN] * 4, [4.0, NAN, 3.0, 2.0], [4.0, INF, 3.0, 2.0],
    [INF, 1.5, 3.0, 2.0], [-1.0, 1.5, 3.0, 2.0], [4.0, 0.0, 3.0, 2.0], [4.0, 0.999, 3.0, 2.0],
    [4.0, 1.5, -3.0, 2.0], [4.0, 1.5, 3.0, 2.5], [4.5, 1.5, 3.0, 2.0], ["4", "1.5", "3", "2"], "abcd", {"T": 1},
    4.0, [True, 1.5, 3.0, 2.0], [4.0, 1.5, 3.0, 10**400],
]  # fmt: skip
FIELDS: list[tuple[str, Any, str]] = [
    *[("lr", v, "0 or more") for v in ("1e-3", NAN, INF, -1, None, True, [1e-3])],
    *[("lr", torch.tensor(v), "0 or more") for v in (NAN, -1.0)],
    *[("weight_decay", v, "0 or more") for v in (NAN, -1, "0.1", None)],
    ("weight_decay", 10**400, "too large for a float"),
    *[("eps", v, "0 or more") for v in (-1, None, NAN, "0")],
    *[("betas", v, "two numbers") for v in ([0.9], "x", None, 0.9, {0.9: 1, 0.8: 2})],
    ("betas", [NAN, 0.9], "less than 1"),
    ("betas", (0.9, 1.0), "less than 1"),
    *[("maximize", v, "True or False") for v in ("false", 1, None)],
    ("verify_every", "x", "whole number"),
    ("fused", "x", "True or False"),
    ("gamma", 2.0, "between 0"),
    ("alpha_max", 0.5, "1 or more"),
    ("scope", "model", "'global' or 'layer'"),
    ("clip_norm", -1.0, "more than 0"),
]
BAD: dict[str, tuple[Change, str]] = {
    **{f"statistics {v!r}": (in_groups(alphaadam_state=v), r"alphaadam_state=.*remove it") for v in STATISTICS},
    **{f"{n}={v!r}"[:40]: (in_groups(**{n: v}), rf"group 0 of the checkpoint: {n}.*{f}") for n, v, f in FIELDS},
    "lr of the second group": (in_group(1, lr=-1), r"group 1 of the checkpoint: lr=-1"),
    "statistics that differ": (in_group(1, alphaadam_state=[9.0, 2.0, 5.0, 5.0]), r"\[9.0, 2.0, 5.0, 5.0\] in group 1"),
    "statistics in one group": (without("param_groups", 0, "alphaadam_state"), r"missing in group 0"),
    **{f"no {n}": (without("param_groups", 1, n), f"group 1 of the checkpoint has no {n}") for n in ("lr", "betas")},
    "no params": (without("param_groups", 1, "params"), r"group 1 of the checkpoint has no parameters"),
    "params None": (in_group(0, params=None), r"group 0 of the checkpoint has no parameters"),
    "a parameter less": (without("param_groups", 1, "params", 0), r"has 1 parameters, that of this optimizer 2"),
    "a parameter twice": (in_group(1, params=[0, 2]), r"parameter 0 of the checkpoint stands twice"),
    "no state": (without("state"), r"no 'state'"),
    "a state that is none": (lambda saved: saved["state"].update({1: [1, 2]}), r"parameter 1 .* has \[1, 2\]"),
    "another shape": (in_state(0, exp_avg=torch.zeros(2, 3)), r"exp_avg of parameter 0\.0 .*\(2, 3\).*\(4, 3\)"),
    "another size": (in_state(2, exp_avg_sq=torch.zeros(1)), r"exp_avg_sq of parameter 1\.1 .*\(1,\)"),
    "states swapped": (swap_states, r"of parameter 0\.0 .* of another model"),
    "a moment missing": (without("state", 0, "exp_avg_sq"), r"has exp_avg of a parameter, where AlphaAdam keeps"),
    "no step": (without("state", 1, "step"), r"step=None of parameter 1\.0"),
    **{
        f"step {v!r}": (in_state(1, step=v), r"step=.* of parameter 1\.0 .*0 or more")
        for v in (-1, NAN, INF, 2.5, "3", None, True, torch.tensor([3.0, 3.0]), torch.tensor(-1.0), 10**400)
    },
    **{f"exp_avg {v!r}": (in_state(0, exp_avg=v), r"exp_avg of parameter 0\.0") for v in ("x", None, 3.0)},
    "integers": (in_state(0, exp_avg=torch.zeros(4, 3, dtype=torch.int64)), r"is torch\.int64.*floating point"),
    "complex": (in_state(0, exp_avg=torch.zeros(4, 3, dtype=torch.complex64)), r"is torch\.complex64"),
    "negative squares": (negate_squares, r"exp_avg_sq of parameter 1\.0 .* negative"),
    "the maximum of squares": (in_state(0, max_exp_avg_sq=torch.zeros(4, 3)), r"max_exp_avg_sq.*another optimizer"),
    "amsgrad": (in_groups(amsgrad=True), r"amsgrad=True, which AlphaAdam does not have"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_state_is_refused_and_nothing_has_changed(case: str) -> None:
    change, message = BAD[case]
    saved = copy.deepcopy(trained().state_dict())
    change(saved)
    running = trained(steps=2)
    beside = trained(steps=2)
    before = snapshot(running)
    with pytest.raises(ValueError, match=message):
        running.load_state_dict(saved)
    assert snapshot(running) == before
    for grads in STEPS[2:]:
        step_with(running, grads)
        step_with(beside, grads)
    assert snapshot(running) == snapshot(beside)
    assert all(same_bits(p, q) for p, q in zip(parameters_of(running), parameters_of(beside), strict=True))


@pytest.mark.parametrize(
    "state",
    [
        {}, None, [], [{}], "state", {"state": {}}, {"state": {}, "param_groups": [3, 4]},
        {"state": [], "param_groups": [{}, {}]}, {"state": {}, "param_groups": [{"params": [[0]]}, {"params": []}]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_state_at_all(state: Any) -> None:
    optimizer = trained()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"is no state of an optimizer.*state_dict\(\)"):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (AlphaSGD, in_groups(momentum=1.0), "momentum=1.0"),
        (AlphaSGD, in_groups(nesterov="false"), "nesterov='false': give True or False"),
        (AlphaSGD, without("param_groups", 0, "weight_decay"), "no weight_decay"),
        (AlphaSGD, in_state(0, momentum_buffer=None), "no momentum_buffer of parameter 0.0"),
        (AlphaLion, in_state(0, exp_avg_sq=torch.zeros(4, 3)), "exp_avg, exp_avg_sq of a parameter, where AlphaLion"),
        (AlphaLion, in_groups(betas=[2, 0.9]), "betas"),
    ],
)
def test_the_rest_of_the_family(kind: type[AlphaOptimizer], change: Change, message: str) -> None:
    saved = copy.deepcopy(trained(kind).state_dict())
    change(saved)
    optimizer = trained(kind, steps=2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    "case", ["statistics that differ", "lr='1e-3'", "another shape", "negative squares", "step -1"]
)
def test_a_pickle_that_was_tampered_with_is_refused_too(case: str) -> None:
    change, message = BAD[case]
    optimizer = trained()
    kept = optimizer.__getstate__()
    state = dict(enumerate(kept["state"][param] for param in parameters_of(optimizer)))
    groups = [dict(group) for group in kept["param_groups"]]
    change({"param_groups": groups, "state": state})
    kept["param_groups"] = groups
    kept["state"] = dict(zip(parameters_of(optimizer), state.values(), strict=True))
    with pytest.raises(ValueError, match=message):
        AlphaAdam.__new__(AlphaAdam).__setstate__(pickle.loads(pickle.dumps(kept)))


# ---- what is taken


@pytest.mark.parametrize(
    "change",
    [
        in_groups(alphaadam_state=(4.0, 1.5, 3.0, 2.0)),
        in_groups(alphaadam_state=torch.tensor([4.0, 1.5, 3.0, 2.0])),
        in_groups(alphaadam_state=np.array([4, 1.5, 3, 2], dtype=np.float32)),
        in_groups(betas=[0.9, 0.999]),
        in_groups(betas=np.array([0.9, 0.999])),
        in_groups(eps=np.float64(1e-8), lr=torch.tensor(1e-2)),
        in_state(1, step=4),
        in_state(1, step=np.float32(4)),
        in_state(1, step=torch.tensor([4.0], dtype=torch.float64)),
        lambda saved: [saved["state"][i].clear() for i in range(3)] and None,
        without("state", 2),
        in_groups(a_key_of_a_tool="anything", initial_lr=0.1),
        in_groups(foreach=True, fused=True),
    ],
)
def test_other_spellings_of_a_state_are_taken(change: Change) -> None:
    saved = copy.deepcopy(trained().state_dict())
    change(saved)
    optimizer = new()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    step_with(optimizer, STEPS[4])
    again = optimizer.state_dict()
    for group in again["param_groups"]:
        assert type(group["betas"]) is tuple
        assert [type(number) for number in group["alphaadam_state"]] == [float] * 4
    assert all(s["step"].shape == () and s["step"].dtype == torch.float32 for s in again["state"].values())


def test_what_trainers_keep_in_the_state_is_loaded_as_in_adamw(tmp_path: Path) -> None:
    """Beside the moments of a parameter, and under a key of its own."""
    loaded = {}
    for kind in (torch.optim.AdamW, AlphaAdam):
        optimizer: torch.optim.Optimizer = kind([nn.Parameter(p) for p in tensors(0)])
        step_with(optimizer, gradients(1)[0])
        for param in parameters_of(optimizer):
            optimizer.state[param]["offload_buffer"] = torch.full_like(param, 2.0)
        optimizer.state["trainer"] = {"seen": 7}  # type: ignore[index]
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        loaded[kind] = kind([nn.Parameter(p.detach().clone()) for p in parameters_of(optimizer)])
        loaded[kind].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ours = loaded[AlphaAdam]
    assert ours.state["trainer"] == loaded[torch.optim.AdamW].state["trainer"] == {"seen": 7}
    assert all(torch.equal(ours.state[p]["offload_buffer"], torch.full_like(p, 2.0)) for p in parameters_of(ours))
    beside = AlphaAdam([nn.Parameter(p) for p in tensors(0)])
    step_with(beside, gradients(1)[0])
    for grads in gradients(3)[1:]:
        step_with(ours, grads)
        step_with(beside, grads)
    assert all(same_bits(p, q) for p, q in zip(parameters_of(ours), parameters_of(beside), strict=True))


def test_what_trainers_keep_in_the_state_before_the_first_step_is_no_state_of_ours() -> None:
    optimizer, beside = new(), new()
    for param in parameters_of(optimizer):
        optimizer.state[param]["offload_buffer"] = torch.ones(2)
    for grads in STEPS:
        step_with(optimizer, grads)
        step_with(beside, grads)
    assert all(same_bits(p, q) for p, q in zip(parameters_of(optimizer), parameters_of(beside), strict=True))


def test_a_hook_may_make_a_state_fit_before_it_is_checked() -> None:
    saved = copy.deepcopy(trained().state_dict())
    right = copy.deepcopy(saved)
    in_groups(lr="1e-2")(saved)
    optimizer = new()
    hook = optimizer.register_load_state_dict_pre_hook(lambda _, state: right)
    optimizer.load_state_dict(saved)
    assert memory_of(optimizer) == right["param_groups"][0]["alphaadam_state"]
    hook.remove()
    with pytest.raises(ValueError, match="lr='1e-2'"):
        optimizer.load_state_dict(saved)
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    saved = copy.deepcopy(trained(gamma=0.5).state_dict())
    optimizer = trained(steps=2)
    before = snapshot(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"gamma=0\.5"):
            optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_statistics_put_into_the_groups_by_hand_are_checked_too() -> None:
    optimizer = trained()
    optimizer.param_groups[0]["alphaadam_state"] = [4.0, NAN, 1.0, 1.0]
    before = [p.detach().clone() for p in parameters_of(optimizer)]
    with pytest.raises(ValueError, match="alphaadam_state="):
        step_with(optimizer, STEPS[4])
    assert all(same_bits(p, q) for p, q in zip(parameters_of(optimizer), before, strict=True))


# ---- sharded parameters


def _load_sharded(what: str) -> str | None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(12.0).view(6, 2)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    param = nn.Parameter(sharded)
    optimizer = AlphaAdam([param])
    param.grad = distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)])
    optimizer.step()
    saved = copy.copy(optimizer.state_dict())
    values: dict[str, Tensor] = {
        "its own kind": distribute_tensor(whole, mesh, [Shard(0)]),
        "this rank's part": sharded.to_local().clone(),
        "the whole tensor": whole,
        "another placement": distribute_tensor(whole, mesh, [Replicate()]),
    }
    saved["state"] = {0: {**saved["state"][0], "exp_avg": values[what]}}
    before = optimizer.state[param]["exp_avg"]
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        assert optimizer.state[param]["exp_avg"] is before
        return str(error)
    optimizer.step()
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("its own kind", None),
        ("this rank's part", None),
        ("the whole tensor", "set_optimizer_state_dict"),
        ("another placement", "Replicate"),
    ],
)
def test_a_state_of_another_sharding(what: str, message: str | None) -> None:
    for said in threads.run(2, _load_sharded, what):
        assert (said is None) if message is None else (message in str(said))
