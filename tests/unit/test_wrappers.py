"""Wrappers that look like the optimizer, as Lightning's and Fabric's: what goes through them reaches it unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from alphaadam_dist.optimizer import AlphaOptimizer

from .problems import gradients, memory_of, parameters_of, same_bits, step_with, tensors


class Wrapper:
    """Gets the class of what it holds and asks it for every attribute that it has not. Its step is its own."""

    def __init__(self, optimizer: Any, *, copies: bool = False) -> None:
        if copies:
            self.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}
        self.inner = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (type(self), type(optimizer)), {})  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Stepless:
    """The same without a step of its own, so the optimizer's runs with this object as self."""

    def __init__(self, optimizer: Any, *, copies: bool = False) -> None:
        Wrapper.__init__(self, optimizer, copies=copies)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Copy:
    """Only a copy of the optimizer's attributes, as they were when it was wrapped."""

    def __init__(self, optimizer: Any) -> None:
        Wrapper.__init__(self, optimizer, copies=True)  # type: ignore[arg-type]


KINDS: dict[str, Callable[[AlphaAdam], Any]] = {
    "delegating": Wrapper,
    "copying": lambda optimizer: Wrapper(optimizer, copies=True),
    "stepless": Stepless,
    "stepless copying": lambda optimizer: Stepless(optimizer, copies=True),
    "copy": Copy,
}
kinds = pytest.mark.parametrize("kind", KINDS)
MODES: dict[str, dict[str, Any]] = {
    "global": {"alpha_warmup": 9}, "layer": {"scope": "layer"}, "delayed": {"sync": "delayed"},
    "clipped": {"clip_norm": 1.0},
}  # fmt: skip
modes = pytest.mark.parametrize("mode", MODES)
STEPS = gradients(8)


def new(mode: str, params: list[Tensor] | None = None) -> AlphaAdam:
    copies = [nn.Parameter(p.detach().clone()) for p in params or tensors(0)]
    return AlphaAdam([{"params": copies[:2], "lr": 3e-3}, {"params": copies[2:]}], lr=1e-2, **MODES[mode])


def same(a: AlphaOptimizer, b: AlphaOptimizer) -> bool:
    pairs = list(zip(parameters_of(a), parameters_of(b), strict=True))
    states = all(same_bits(a.state[p][name], b.state[q][name]) for p, q in pairs for name in ("step", *a.moments))
    return states and all(same_bits(p, q) for p, q in pairs) and memory_of(a) == memory_of(b)


@kinds
@modes
def test_looking_through_a_wrapper_shows_the_optimizer_and_changes_nothing(kind: str, mode: str) -> None:
    watched, alone = new(mode), new(mode)
    wrapper = KINDS[kind](watched)
    assert isinstance(wrapper, AlphaAdam)
    before = dict(vars(wrapper))
    seen = []
    for grads in STEPS:
        seen.append(wrapper.alpha)
        assert (wrapper.alpha, wrapper.agreement, wrapper.metrics()) == (
            watched.alpha, watched.agreement, watched.metrics(),
        )  # fmt: skip
        assert repr(wrapper).split("\n", 1)[1] == repr(watched).split("\n", 1)[1]
        saved, right = wrapper.state_dict()["param_groups"], watched.state_dict()["param_groups"]
        assert saved == right
        assert wrapper.param_groups is watched.param_groups
        assert wrapper.state is watched.state
        step_with(wrapper, grads)
        step_with(alone, grads)
    assert len(seen) > len([alpha for alpha in seen if alpha in (1.0, {})]) + 3
    assert same(watched, alone)
    assert vars(wrapper) == before


@kinds
@modes
def test_steps_through_a_wrapper_and_past_it_are_one_run(kind: str, mode: str) -> None:
    inner, alone = new(mode), new(mode)
    wrapper = KINDS[kind](inner)
    for i, grads in enumerate(STEPS):
        step_with(wrapper if i % 3 else inner, grads)
        step_with(alone, grads)
    assert same(inner, alone)
    assert inner.metrics()["steps"] == len(STEPS)


@kinds
@modes
def test_loading_through_a_wrapper_loads_the_optimizer(kind: str, mode: str) -> None:
    whole, inner = new(mode), new(mode)
    wrapper = KINDS[kind](inner)
    for grads in STEPS[:3]:
        step_with(whole, grads)
    saved = copy.deepcopy(whole.state_dict())
    inner.load_state_dict(new(mode).state_dict())  # a load past the wrapper must not part the two
    assert wrapper.param_groups is inner.param_groups
    wrapper.load_state_dict(saved)
    for p, q in zip(parameters_of(inner), parameters_of(whole), strict=True):
        p.data.copy_(q)
    assert wrapper.metrics() == inner.metrics() != new(mode).metrics()
    for grads in STEPS[3:]:
        step_with(whole, grads)
        step_with(wrapper, grads)
    assert same(inner, whole)


@kinds
def test_a_group_added_through_a_wrapper_is_the_optimizers(kind: str) -> None:
    inner, alone = new("global"), new("global")
    wrapper = KINDS[kind](inner)
    extra = torch.ones(3)
    for optimizer in (wrapper, alone):
        step_with(optimizer, STEPS[0])
        optimizer.add_param_group({"params": [nn.Parameter(extra.clone())], "lr": 0.1})
        with pytest.raises(ValueError, match=r"lr=-1"):
            optimizer.add_param_group({"params": [nn.Parameter(extra.clone())], "lr": -1})
        for grads in STEPS[1:]:
            step_with(optimizer, [*grads, extra])
    assert len(inner.param_groups) == 3
    assert same(inner, alone)


@kinds
def test_a_scheduler_over_a_wrapper_moves_the_optimizers_rate(kind: str) -> None:
    inner, alone = new("global"), new("global")
    wrapper = KINDS[kind](inner)
    for optimizer in (wrapper, alone):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        for grads in STEPS:
            step_with(optimizer, grads)
            scheduler.step()
    assert [group["lr"] for group in inner.param_groups] == [3e-3 / 256, 1e-2 / 256]
    assert same(inner, alone)


@kinds
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copied_wrapper_holds_a_whole_optimizer(kind: str, how: Callable[[Any], Any]) -> None:
    inner, alone = new("global"), new("global")
    wrapper = KINDS[kind](inner)
    for grads in STEPS[:3]:
        step_with(wrapper, grads)
        step_with(alone, grads)
    before = memory_of(inner)
    twin = how(wrapper)
    assert (twin.alpha, memory_of(twin.inner), memory_of(inner)) == (inner.alpha, before, before)
    assert (twin.inner is inner) == (how is copy.copy)
    for grads in STEPS[3:]:
        step_with(twin, grads)
        step_with(alone, grads)
    assert same(twin.inner, alone)
    assert twin.alpha == alone.alpha
    assert (memory_of(inner) == before) == (how is copy.deepcopy)


@kinds
def test_a_process_group_given_through_a_wrapper_is_the_optimizers(kind: str) -> None:
    inner = new("global")
    wrapper = KINDS[kind](inner)
    group: Any = object()
    wrapper.process_group = group
    assert inner.process_group is group is wrapper.process_group


@modes
def test_nothing_is_made_late(mode: str) -> None:
    """An attribute made after construction is what a wrapper would keep to itself."""
    optimizer = new(mode)
    before = dict(vars(optimizer))
    for grads in STEPS[:3]:
        step_with(optimizer, grads)
        _ = optimizer.alpha, optimizer.metrics(), optimizer.agreement
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    step_with(optimizer, [*STEPS[3], torch.ones(2)])
    assert {name: id(value) for name, value in vars(optimizer).items()} == {n: id(v) for n, v in before.items()}
