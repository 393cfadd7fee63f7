"""Parameters that DeepSpeed did not know at initialize, or does not know at all: served at stage 0, else named."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from tests.models import Given, given_gradients
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import MODES, assert_equal, dtype_of

STEPS, ADDED_AT = 8, 3
LATE = ("weight", "bias")
"""Parameters that are frozen up to step ADDED_AT, then thawed and added as a group of their own."""


def trained(model: Given) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad and name not in LATE]


def late(model: Given) -> dict[str, Any]:
    return {"params": [(name, getattr(model, name)) for name in LATE], "weight_decay": 0.3, "lr": 0.02}


def gradients() -> list[dict[str, Tensor]]:
    steps = given_gradients(STEPS)
    return [{n: g for n, g in step.items() if i >= ADDED_AT or n not in LATE} for i, step in enumerate(steps)]


def under_deepspeed(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    model = Given()
    for name in LATE:
        getattr(model, name).requires_grad_(False)
    optimizer = AlphaAdam(trained(model), lr=engine.LR, **options)
    started, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    seen = []
    for i, given in enumerate(gradients()):
        if i == ADDED_AT:
            for name in LATE:
                getattr(started.module, name).requires_grad_(True)
            optimizer.add_param_group(late(started.module))
        started.backward(started(given))
        started.step()
        seen.append(engine.observe(optimizer))
    result = {"params": engine.masters(started), "seen": seen}
    started.destroy()
    return result


def alone(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    model = Given().to(dtype).float()
    optimizer = AlphaAdam(trained(model), lr=engine.LR, **options)
    seen = []
    for i, given in enumerate(gradients()):
        if i == ADDED_AT:
            optimizer.add_param_group(late(model))
        for name, gradient in given.items():
            getattr(model, name).grad = gradient
        optimizer.step()
        seen.append(engine.observe(optimizer))
    return {"params": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, "seen": seen}


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}], ids=["exact", "layer"])
@pytest.mark.parametrize("mode", ["zero0", "zero0-bf16"])
def test_a_group_added_at_stage_zero(ranks2: Ranks, mode: str, options: dict[str, Any]) -> None:
    assert_equal(ranks2.run(under_deepspeed, MODES[mode], options), alone(options, dtype_of(mode)))


@pytest.mark.parametrize("mode", ["zero1", "zero1-bf16-fp32-accumulation", "zero2", "zero3"])
def test_a_group_that_deepspeed_would_not_step_is_refused(ranks2: Ranks, mode: str) -> None:
    stage = MODES[mode]["zero_optimization"]["stage"]
    with pytest.raises(
        RankError,
        match=f"ValueError: add_param_group after deepspeed.initialize, at stage {stage}: .*before initialize",
    ):
        ranks2.run(under_deepspeed, MODES[mode], {})


def with_temperature(stage: int, *, added: bool = False, named: bool = False) -> tuple[list[float], Any]:
    """A learnable factor of the loss that is no parameter of the engine's module."""
    model, temperature = Given(), nn.Parameter(torch.ones(1))
    inside: list[Any] = [(n, p) if named else p for n, p in model.named_parameters() if p.requires_grad]
    outside: list[Any] = [("temperature", temperature) if named else temperature]
    optimizer = AlphaAdam(inside if added else inside + outside, lr=engine.LR, scope="layer")
    started, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine.config(stage))
    if added:
        optimizer.add_param_group({"params": outside})
    seen = []
    for given in given_gradients(4):
        started.backward(started(given) * temperature)
        started.step()
        started.optimizer.zero_grad()
        seen.append(temperature.item())
    alphas: Any = optimizer.alpha
    started.destroy()
    return seen, alphas


@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
def test_a_parameter_outside_the_module_on_one_rank(ranks1: Ranks, added: bool, named: bool) -> None:
    seen, alphas = ranks1.run(with_temperature, 0, added=added, named=named)[0]
    assert len(set(seen)) == 4
    at = "parameter 0 of group 1" if added else "parameter 5 of group 0"
    assert set(alphas) == {"embedding", "weight", "norm", "bias", "one", "temperature" if named else at}


@pytest.mark.parametrize(
    ("stage", "how"), [(0, {}), (0, {"added": True}), (1, {}), (3, {"named": True})], ids=lambda value: str(value)
)
def test_a_parameter_outside_the_module_of_several_ranks_is_named(
    ranks2: Ranks, stage: int, how: dict[str, bool]
) -> None:
    """DeepSpeed would average no gradients for it, and every rank would go its own way."""
    name = "temperature" if "named" in how else "number [05] of its group"
    with pytest.raises(
        RankError, match=rf"outside the engine's module \({name}, of shape \(1,\)\): .* self.temperature"
    ):
        ranks2.run(with_temperature, stage, **how)
