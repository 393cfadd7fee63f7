"""DeepSpeed's AutoEP: experts that lie on other ranks under one name are other parameters, each counted once."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from tests.cells import Cell, served
from tests.marks import nightly_but
from tests.older import since_deepspeed
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.mixtral import LAYER, Mixtral, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_ranks_afterwards"),
    since_deepspeed("0.19.8", "has no such AutoEP"),
]

CELLS: dict[str, dict[int, Cell]] = {"AutoEP (`expert_parallel`)": {stage: served() for stage in range(4)}}
STEPS, SAVED_AFTER = 6, 3


def values(key: str, shape: torch.Size | tuple[int, ...], step: int) -> Tensor:
    """A parameter at step -1, its gradient after; exact in bf16."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)) * 100 + step + 1)
    return torch.randn(shape, generator=generator).bfloat16().float()


class Model(Mixtral):
    """Experts that are exact in bf16, and a given gradient."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for name, weights in self.get_submodule(LAYER).experts.named_parameters():
                weights.copy_(values(name, weights.shape, -1))
        self.step = 0

    def forward(self, zero: Tensor) -> Tensor:
        products = [
            (param.float() * values(key_of(name, param), param.shape, self.step)).sum()
            for name, param in engine.gathered(self)
        ]
        return torch.stack(products).sum() + zero


def key_of(name: str, param: Any) -> str:
    """Two expert-parallel ranks each have two of the experts."""
    return name if getattr(param, "allreduce", True) else f"{name}[expert rank {dist.get_rank() % 2}]"


def whole(started: Any) -> dict[str, Tensor]:
    named = list(started.module.named_parameters())
    at_3 = started.zero_optimization_stage() == 3
    held = [(name, param, safe_get_full_fp32_param(param) if at_3 else param) for name, param in named]
    return {key_of(name, param): full.detach().clone() for name, param, full in held}


def steps(started: Any, first: int, last: int) -> list[Any]:
    seen = []
    for step in range(first, last):
        started.module.step = step
        started.backward(started(torch.zeros(())))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    return seen


def given(stage: int, options: dict[str, Any], folder: str = "") -> dict[str, Any]:
    """With a folder another engine goes on from a checkpoint after half the steps."""
    started = start(Model(), stage, "AlphaAdam", lr=engine.LR, **options)
    begun = whole(started)
    seen = steps(started, 0, SAVED_AFTER)
    if folder:
        started.save_checkpoint(folder, tag="t")
        started.destroy()
        started = start(Model(), stage, "AlphaAdam", lr=engine.LR, **options)
        started.load_checkpoint(folder, tag="t")
    seen += steps(started, SAVED_AFTER, STEPS)
    result = {"begun": begun, "seen": seen, "params": whole(started)}
    started.destroy()
    return result


def assert_one_process(ranks: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """One process that has all parameters, of which DeepSpeed halves the experts' gradients, being on two ranks."""
    named = {key: nn.Parameter(value) for rank in ranks for key, value in rank["begun"].items()}
    assert sum(param.numel() for param in named.values()) == sum(param.numel() for param in Model().parameters())
    optimizer, seen = AlphaAdam(named.items(), lr=engine.LR, weight_decay=0.1, **options), []
    for step in range(STEPS):
        for key, param in named.items():
            param.grad = values(key, param.shape, step) / (2 if "[expert" in key else 1)
        optimizer.step()
        seen.append(engine.observe(optimizer))
    for rank in ranks:
        assert rank["seen"] == seen
        for key, param in rank["params"].items():
            assert torch.equal(param, named[key]), key


OPTIONS: dict[str, dict[str, Any]] = {"exact": {}, "delayed": {"sync": "delayed"}, "layer": {"scope": "layer"}}


@pytest.mark.parametrize(("world", "stage", "setting"), nightly_but(product((2, 4), range(4), OPTIONS), every=4))
def test_experts_equal_one_process(request: pytest.FixtureRequest, world: int, stage: int, setting: str) -> None:
    """On 4 ranks each expert is itself sharded, or replicated at stage 0, over two."""
    ranks: Ranks = request.getfixturevalue(f"ranks{world}")
    assert_one_process(ranks.run(given, stage, OPTIONS[setting]), OPTIONS[setting])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_goes_on(ranks4: Ranks, tmp_path: Path, stage: int) -> None:
    assert_one_process(ranks4.run(given, stage, {}, str(tmp_path)), {})
