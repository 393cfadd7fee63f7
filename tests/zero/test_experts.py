"""DeepSpeed MoE: experts that share a local name on different ranks are different parameters, each counted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from tests.cells import Cell, refused, served
from tests.ranks import RankError, Ranks
from tests.zero import engine

pytestmark = pytest.mark.slow

SAYS_3 = r"MoE layers with zero_optimization.stage=3: .* use stage 1 or 2"
CELLS: dict[str, dict[int, Cell]] = {
    "DeepSpeed's MoE layers": {**{stage: served() for stage in range(3)}, 3: refused(SAYS_3, "")}
}
STEPS, LR = 8, 1e-2
WIDTH = 6


EXPERT = "moe.deepspeed_moe.experts.deepspeed_experts.0"
SHAPES = {
    "dense.weight": torch.Size((5, WIDTH)),
    "dense.bias": torch.Size((5,)),
    "moe.deepspeed_moe.gate.wg.weight": torch.Size((2, WIDTH)),
    f"{EXPERT}.weight": torch.Size((WIDTH, WIDTH)),
    f"{EXPERT}.bias": torch.Size((WIDTH,)),
}


class Experts(nn.Module):
    """A dense layer and an MoE layer of two experts, one on each expert-parallel rank, with a given gradient."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, 5)
        self.moe = MoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=2, ep_size=ep_size, k=1)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((p.float() * gradients[n]).sum() for n, p in self.named_parameters())  # type: ignore[return-value]


def values(name: str, shape: torch.Size, step: int, expert: int | None) -> Tensor:
    """A tensor that depends on the parameter, the step and the expert: weights at step -1, gradients after."""
    seed = sum(map(ord, name)) * 1000 + (step + 1) * 10 + (expert or 0)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def is_expert(name: str) -> bool:
    return "experts" in name


def run(ds_config: dict[str, Any], options: dict[str, Any], client: bool) -> dict[str, Any]:
    import deepspeed

    model = Experts(ep_size=2)
    rank = dist.get_rank() % 2
    named = list(model.named_parameters())
    for name, param in named:
        param.data.copy_(values(name, param.shape, -1, rank if is_expert(name) else None))
    config, kwargs = {**ds_config}, {}
    if client:
        params = {"params": [p for _, p in named], "name": "all", "weight_decay": 0.1}
        groups = split_params_into_different_moe_groups_for_optimizer(params)
        kwargs["optimizer"] = AlphaAdam(groups, lr=LR, **options)
    else:
        config["optimizer"] = {"type": "AlphaAdam", "params": {"lr": LR, "weight_decay": 0.1, **options}}
        kwargs["model_parameters"] = [p for _, p in named]
    started, *_ = deepspeed.initialize(model=model, config=config, **kwargs)
    seen = []
    for step in range(STEPS):
        gradients = {n: values(n, p.shape, step, rank if is_expert(n) else None) for n, p in model.named_parameters()}
        started.backward(started(gradients))
        started.step()
        seen.append((started.basic_optimizer.alpha, started.basic_optimizer.agreement))
    result = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    started.destroy()
    return {"seen": seen, "params": result}


def alone(options: dict[str, Any]) -> dict[str, Any]:
    """One process that has the dense parameters and both experts, whose gradients DeepSpeed halves for two of them."""
    named: list[tuple[str, nn.Parameter]] = []
    experts: list[int | None] = []
    for name, shape in SHAPES.items():
        for expert in (0, 1) if is_expert(name) else (None,):
            key = name if expert is None else f"{name}[expert rank {expert}]"
            named.append((key, nn.Parameter(values(name, shape, -1, expert))))
            experts.append(expert)
    optimizer = AlphaAdam(named, lr=LR, weight_decay=0.1, **options)
    seen = []
    for step in range(STEPS):
        for (key, param), expert in zip(named, experts, strict=True):
            gradient = values(key.partition("[")[0], param.shape, step, expert)
            param.grad = gradient if expert is None else gradient / 2
        optimizer.step()
        seen.append((optimizer.alpha, optimizer.agreement))
    return {"seen": seen, "params": {key: param.detach() for key, param in named}}


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"sync": "delayed"}], ids=["exact", "layer", "delayed"])
@pytest.mark.parametrize("client", [True, False], ids=["client", "json"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_experts_equal_one_process(
    request: pytest.FixtureRequest, world: int, stage: int, client: bool, options: dict[str, Any]
) -> None:
    """Expert parallel 2: on 4 ranks each expert is itself sharded, or replicated at stage 0, over two."""
    ranks: Ranks = request.getfixturevalue(f"ranks{world}")
    expected = alone(options)
    for rank, result in enumerate(ranks.run(run, engine.config(stage), options, client)):
        assert result["seen"] == expected["seen"]
        for name, param in result["params"].items():
            key = f"{name}[expert rank {rank % 2}]" if is_expert(name) else name
            assert torch.equal(param, expected["params"][key]), key


def test_experts_under_stage_three_are_refused(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match=SAYS_3):
        ranks2.run(run, engine.config(3), {}, True)
