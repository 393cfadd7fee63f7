"""DeepSpeed's AutoTP: one alpha over tensor-parallel and data-parallel ranks, what all hold counted once."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from tests.cells import Cell, served
from tests.equality.llamas import deviation
from tests.marks import nightly_but
from tests.models import decay_groups, given_gradients, tiny_llama, token_batches
from tests.older import since_deepspeed
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import dtype_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_ranks_afterwards"),
    since_deepspeed("0.19.8", "has another AutoTP"),
]

CELLS: dict[str, dict[int, Cell]] = {"AutoTP (`tensor_parallel.autotp_size`)": {stage: served() for stage in range(4)}}
SPECS = [
    {"patterns": [r".*up\.weight$"], "partition_type": "column"},
    {"patterns": [r".*down\.weight$"], "partition_type": "row"},
]


class Layers(nn.Module):
    """Linear layers that AutoTP splits by rows and by columns, others that it leaves, and a given gradient."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.down, self.left = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 3)
        self.gradients: dict[str, Tensor] = {}  # not an input: DeepSpeed compares those of tensor-parallel ranks

    def forward(self, zero: Tensor) -> Tensor:
        products = [(p.float() * mine(n, self.gradients[n])).sum() for n, p in engine.gathered(self)]
        return torch.stack(products).sum() + zero


def mine(name: str, whole: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    rank, world = groups.get_tensor_model_parallel_rank(), groups.get_tensor_model_parallel_world_size()
    dim = split_at(name)
    return whole if dim is None else whole.chunk(world, dim)[rank]


def split_at(name: str) -> int | None:
    if name.startswith("up"):
        return 0
    return 1 if name == "down.weight" else None


def config(stage: int, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    parallel = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": SPECS}}
    return {**engine.config(stage, dtype, **more), "tensor_parallel": parallel}


def start(ds_config: dict[str, Any], options: dict[str, Any]) -> Any:
    model = Layers()
    optimizer = AlphaAdam(decay_groups(model), lr=engine.LR, **options)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]


def steps(started: Any, gradients: list[dict[str, Tensor]]) -> list[Any]:
    seen = []
    for of_step in gradients:
        started.module.gradients = of_step
        started.backward(started(torch.zeros(())))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    return seen


def given(ds_config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    started = start(ds_config, options)
    seen = steps(started, given_gradients(8, like=Layers()))
    result = {"seen": seen, "params": engine.masters(started), "rank": groups.get_tensor_model_parallel_rank()}
    started.destroy()
    return result


@cache
def alone(dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    model = Layers().to(dtype).float()
    optimizer = AlphaAdam(decay_groups(model), lr=engine.LR, **options)
    seen = []
    for gradients in given_gradients(8, like=Layers()):
        for name, param in model.named_parameters():
            param.grad = gradients[name].clone()
        optimizer.step()
        seen.append(engine.observe(optimizer))
    return {"seen": seen, "params": {n: p.detach() for n, p in model.named_parameters()}}


def assert_one_process(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in ranks:
        assert result["seen"] == expected["seen"]
        for name, whole in expected["params"].items():
            dim = split_at(name)
            part = whole if dim is None else whole.chunk(2, dim)[result["rank"]]
            assert torch.equal(result["params"][name], part), name


OPTIONS: dict[str, dict[str, Any]] = {"exact": {}, "delayed": {"sync": "delayed"}, "layer": {"scope": "layer"}}


@pytest.mark.parametrize(
    ("stage", "dtype", "setting"), nightly_but(product(range(4), ("fp32", "bf16"), OPTIONS), every=5)
)
def test_two_by_two_ranks_equal_one_process(ranks4: Ranks, stage: int, dtype: str, setting: str) -> None:
    options = OPTIONS[setting]
    assert_one_process(ranks4.run(given, config(stage, dtype), options), alone(dtype_of(dtype), **options))


def resumed(ds_config: dict[str, Any], folder: str) -> dict[str, Any]:
    """As ``given``, but another engine goes on from a checkpoint after half the steps."""
    gradients = given_gradients(8, like=Layers())
    first = start(ds_config, {})
    seen = steps(first, gradients[:4])
    first.save_checkpoint(folder, tag="t")
    first.destroy()
    second = start(ds_config, {})
    second.load_checkpoint(folder, tag="t")
    seen += steps(second, gradients[4:])
    result = {"seen": seen, "params": engine.masters(second), "rank": groups.get_tensor_model_parallel_rank()}
    second.destroy()
    return result


@pytest.mark.parametrize("stage", nightly_but([1, 2, 3, 0], every=2))
def test_a_checkpoint_goes_on(ranks4: Ranks, tmp_path: Path, stage: int) -> None:
    assert_one_process(ranks4.run(resumed, config(stage), str(tmp_path)), alone(torch.float32))


def train(optimizer: str, stage: int) -> dict[str, Any]:
    """A tiny Llama that AutoTP splits as Transformers' plan says, each data-parallel rank on its half of each batch."""
    ds_config = {**engine.config(stage), "tensor_parallel": {"autotp_size": 2}}
    started = engine.start(tiny_llama(), ds_config, {"lr": 1e-3}, True, optimizer)
    half = dist.get_rank() // 2
    seen = []
    for batch in token_batches(20, 4):
        mine = batch.chunk(2)[half]
        started.backward(started(input_ids=mine, labels=mine).loss)
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    result = {"params": engine.masters(started), "seen": seen}
    started.destroy()
    return result


def whole(ranks: list[dict[str, Any]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model of the first data-parallel rank."""
    parts = {name: [result["params"][name] for result in ranks[:2]] for name in like}
    dims = {name: [d for d in range(p.ndim) if p.shape[d] != parts[name][0].shape[d]] for name, p in like.items()}
    return {name: torch.cat(held, dims[name][0]) if dims[name] else held[0] for name, held in parts.items()}


def test_llama_equals_one_process(ranks4: Ranks) -> None:
    far = {}
    for name, kind in {"AlphaAdam": AlphaAdam, "AdamW": torch.optim.AdamW}.items():
        one = engine.train_alone({"lr": 1e-3}, optimizer=kind)
        held = ranks4.run(train, name, 1)
        assert all(result["seen"] == held[0]["seen"] for result in held)
        far[name] = deviation(whole(held, one["params"]), one["params"])
    print(f"\nAutoTP at ZeRO-1: {far['AlphaAdam']:.1e} from one process; AdamW {far['AdamW']:.1e}")
    assert 0 < far["AlphaAdam"] < max(5e-6, 10 * far["AdamW"])


def test_bf16_state_is_refused(ranks4: Ranks) -> None:
    message = r"state_dtype='bfloat16' with tensor_parallel\.autotp_size=2: .* leave state_dtype"
    with pytest.raises(RankError, match=message):
        ranks4.run(given, config(2), {"state_dtype": "bfloat16"})
