"""The same on real processes over gloo: a few regimes of the matrix, pipelines, and replicas under different seeds."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B

from alphaadam_dist import AlphaAdam
from alphaadam_dist.verify.model import Llama, next_token_loss, token_batches

from ..marks import nightly_but
from ..ranks import Ranks
from ..zero.engine import Collectives
from . import llamas, pieces
from .given import SETTINGS
from .test_llama import BAR

pytestmark = pytest.mark.slow

REGIMES = ("ddp", "fsdp2", "hsdp", "tp2-fsdp2-norms-plain", "fsdp1-original", "fsdp1-flat")
CHOSEN = ("exact-0.0", "delayed-0.1", "layer-0.0")
SHAPES = pieces.shapes_of(Llama())


@pytest.mark.parametrize(("setting", "regime"), nightly_but(product(CHOSEN, REGIMES), every=5))
def test_twenty_steps(ranks4: Ranks, regime: str, setting: str) -> None:
    ranks, (alone,) = ranks4.run(llamas.train, regime, SETTINGS[setting]), alone_of(setting)
    assert all(rank["seen"] == ranks[0]["seen"] for rank in ranks)
    deviation = deviation_of(ranks, [alone])
    adamw = deviation_of(ranks4.run(llamas.train, regime, None), alone_of(None))
    print(f"\n{regime} {setting} on processes: {deviation:.1e} from one process; AdamW {adamw:.1e}")
    assert 0 < deviation < BAR


def alone_of(setting: str | None) -> list[dict[str, Any]]:
    from .test_llama import run

    return run("plain", setting)


def deviation_of(ranks: list[dict[str, Any]], alone: list[dict[str, Any]]) -> float:
    held = [pieces.assemble([rank["params"] for rank in some], llamas.SHAPES) for some in (ranks, alone)]
    return llamas.deviation(*held)


# ---- pipelines


class Stage(nn.Module):
    """Some of a Llama's parts, under the names that they have in the whole."""

    def __init__(self, model: Llama, *, first: bool, layers: range, last: bool) -> None:
        super().__init__()
        self.embedding = model.embedding if first else None
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})
        self.norm, self.head = (model.norm, model.head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(self.norm(x))


def stages(count: int) -> list[dict[str, Any]]:
    if count == 2:
        return [
            {"first": True, "layers": range(1), "last": False},
            {"first": False, "layers": range(1, 2), "last": True},
        ]
    return [
        {"first": True, "layers": range(0), "last": False},
        {"first": False, "layers": range(1), "last": False},
        {"first": False, "layers": range(1, 2), "last": False},
        {"first": False, "layers": range(0), "last": True},
    ]


def train_pipeline(parts: int, depth: int, options: dict[str, Any], steps: int = 20) -> dict[str, Any]:
    """``parts`` of a model over ``depth`` ranks; with two ranks, each part sharded by FSDP2 over two more."""
    mesh = init_device_mesh("cpu", (depth, 4 // depth), mesh_dim_names=("pp", "dp"))
    first = mesh.get_local_rank("pp")
    modules = nn.ModuleList([Stage(Llama(), **stages(parts)[i]) for i in range(first, parts, depth)])
    if depth == 2:
        for module in modules:
            fully_shard(module, mesh=mesh["dp"])
    named = [pair for module in modules for pair in module.named_parameters()]
    optimizer = AlphaAdam(named, lr=llamas.LR, process_group=dist.group.WORLD, **options)
    held = [
        PipelineStage(module, first + i * depth, parts, torch.device("cpu"), group=mesh.get_group("pp"))
        for i, module in enumerate(modules)
    ]
    schedule = (
        ScheduleGPipe(held[0], 2, loss_fn=next_token_loss)
        if len(held) == 1
        else ScheduleInterleaved1F1B(held, 2, loss_fn=next_token_loss)
    )
    seen, sizes = [], []
    for batch in token_batches(steps, 8):
        mine = llamas.share(batch, mesh["dp"])
        given = {"target": mine} if first == depth - 1 else {}
        schedule.step(*((mine,) if first == 0 else ()), **given)
        with Collectives() as counted:
            optimizer.step()
        optimizer.zero_grad()
        seen.append((optimizer.alpha, optimizer.agreement))
        sizes.append(counted.sizes)
    params = {name: held for module in modules for name, held in pieces.of_model(module, SHAPES).items()}
    return {"seen": seen, "sizes": sizes, "params": params}


def train_alone(options: dict[str, Any], steps: int = 20) -> dict[str, Any]:
    model = Llama()
    optimizer = AlphaAdam(model.named_parameters(), lr=llamas.LR, **options)
    for batch in token_batches(steps, 8):
        next_token_loss(model(batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"alpha": optimizer.alpha, "params": pieces.of_model(model, SHAPES)}


PIPELINES = ((2, 2), (4, 4), (4, 2))
"""Parts of the model, ranks of the pipeline."""


@pytest.mark.parametrize(
    ("parts", "depth", "setting"),
    nightly_but([(*shape, setting) for shape, setting in product(PIPELINES, CHOSEN)], every=3),
)
def test_pipeline_stages_are_one_model(ranks4: Ranks, parts: int, depth: int, setting: str) -> None:
    options = SETTINGS[setting]
    ranks, alone = ranks4.run(train_pipeline, parts, depth, options), train_alone(options)
    for rank in ranks:
        assert [counts for _, counts in rank["seen"]] == [counts for _, counts in ranks[0]["seen"]]
        assert [len(step) for step in rank["sizes"][1:]] == [1] * 19
        if options.get("scope") != "layer":
            assert rank["seen"] == ranks[0]["seen"]
            continue
        for name, alpha in rank["seen"][-1][0].items():
            assert alpha == pytest.approx(alone["alpha"][name], rel=1e-2)
    held = [pieces.assemble([rank["params"] for rank in some], SHAPES) for some in (ranks, [alone])]
    assert llamas.deviation(*held) < BAR


# ---- replicas


def replicas(options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(100 + dist.get_rank())
    return llamas.train("hsdp", options)


@pytest.mark.parametrize("setting", nightly_but(CHOSEN, every=3))
def test_hsdp_replicas_stay_equal_under_different_ambient_seeds(ranks4: Ranks, setting: str) -> None:
    """``assemble`` compares the bits of every element that two ranks hold."""
    ranks = ranks4.run(replicas, SETTINGS[setting])
    assert set(ranks[0]["params"]) == set(ranks[2]["params"])
    for name, (indices, values) in ranks[0]["params"].items():
        assert torch.equal(indices, ranks[2]["params"][name][0])
        assert torch.equal(values, ranks[2]["params"][name][1])
    again = ranks4.run(llamas.train, "hsdp", SETTINGS[setting])
    for first, second in zip(ranks, again, strict=True):
        assert first["seen"] == second["seen"]
        for name in first["params"]:
            assert torch.equal(first["params"][name][1], second["params"][name][1])
