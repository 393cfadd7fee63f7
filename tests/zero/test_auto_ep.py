"""DeepSpeed's AutoEP: experts that lie on other ranks under one name are other parameters, each counted once."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_ranks_afterwards"),
    since_deepspeed("0.19.8", "has no such AutoEP"),
]

CELLS: dict[str, dict[int, Cell]] = {"AutoEP (`expert_parallel`)": {stage: served() for stage in range(4)}}
STEPS, SAVED_AFTER, WIDTH, INNER, EXPERTS = 6, 3, 16, 24, 4


def values(key: str, shape: torch.Size | tuple[int, ...], step: int) -> Tensor:
    """A parameter at step -1, its gradient after; exact in bf16."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)) * 100 + step + 1)
    return torch.randn(shape, generator=generator).bfloat16().float()


class Mlp(nn.Module):
    """A router and experts in one tensor, as Transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), nn.Module()
        self.experts.gate_up_proj = nn.Parameter(values("up", (EXPERTS, 2 * INNER, WIDTH), -1))
        self.experts.down_proj = nn.Parameter(values("down", (EXPERTS, WIDTH, INNER), -1))
        self.experts.act_fn, self.experts.num_experts = nn.SiLU(), EXPERTS


class Model(nn.Module):
    """A layer that AutoEP takes for Mixtral's, a norm, and a given gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.model, layer = nn.Module(), nn.Module()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer.mlp, layer.norm = Mlp(), nn.LayerNorm(WIDTH)
        self.model.layers = nn.ModuleList([layer])
        self.step = 0
        self.config = SimpleNamespace(
            model_type="mixtral", num_local_experts=EXPERTS, num_experts_per_tok=2, hidden_size=WIDTH,
            intermediate_size=INNER, hidden_act="silu",
        )  # fmt: skip

    def forward(self, zero: Tensor) -> Tensor:
        products = [
            (param.float() * values(key_of(name, param), param.shape, self.step)).sum()
            for name, param in engine.gathered(self)
        ]
        return torch.stack(products).sum() + zero


def key_of(name: str, param: Any) -> str:
    """Two expert-parallel ranks each have two of the experts."""
    return name if getattr(param, "allreduce", True) else f"{name}[expert rank {dist.get_rank() % 2}]"


def start(stage: int, options: dict[str, Any]) -> Any:
    expert_parallel = {"enabled": True, "autoep_size": 2, "preset_model": "mixtral", "use_grouped_mm": False}
    adam = {"type": "AlphaAdam", "params": {"lr": engine.LR, "weight_decay": 0.1, **options}}
    config = {**engine.config(stage), "expert_parallel": expert_parallel, "optimizer": adam}
    model = Model()
    return deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]


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
    started = start(stage, options)
    begun = whole(started)
    seen = steps(started, 0, SAVED_AFTER)
    if folder:
        started.save_checkpoint(folder, tag="t")
        started.destroy()
        started = start(stage, options)
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
