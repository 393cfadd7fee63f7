"""DeepSpeed's PipelineModule: one alpha over the stages, a tied layer counted once, the whole model's names."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

from alphaadam_dist import AlphaAdam
from alphaadam_dist.groups import read, split
from tests.cells import Cell, impossible, served
from tests.equality.llamas import deviation
from tests.marks import nightly_but
from tests.models import token_batches
from tests.older import since_deepspeed
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import dtype_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_ranks_afterwards"),
    since_deepspeed("0.19.8", "was not tried with pipelines"),
]

ONLY_0_AND_1 = impossible("ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism", "stages 0 and 1 only")
CELLS: dict[str, dict[int, Cell]] = {"`PipelineModule`": {0: served(), 1: served(), 2: ONLY_0_AND_1, 3: ONLY_0_AND_1}}
STEPS, SAVED_AFTER, MICRO, LAYERS = 6, 3, 2, 5
SHAPES = {"weight": (5, 7), "bias": (3,)}
TIED_WEIGHT = (13, 7)
"""Larger, so that each stage cuts it elsewhere between its data-parallel ranks."""
now = 0
"""The step that is taken: what layers give depends on it."""


def values(layer: str, name: str, step: int) -> Tensor:
    """A parameter of a layer at step -1, its gradient after; exact in bf16."""
    generator = torch.Generator().manual_seed(sum(map(ord, layer + name)) * 100 + step + 1)
    shape = TIED_WEIGHT if (layer[:4], name) == ("ends", "weight") else SHAPES[name]
    return torch.randn(shape, generator=generator).bfloat16().float()


class Layer(nn.Module):
    """It adds to what it is given, so that each of its parameters has a given gradient."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.weight = nn.Parameter(values(key, "weight", -1))
        self.bias = nn.Parameter(values(key, "bias", -1))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        given = {name: factor * values(self.key, name, now) for name in SHAPES}
        return x + (self.weight.float() * given["weight"]).sum() + (self.bias.float() * given["bias"]).sum()


def again(layer: Layer, x: Tensor) -> Tensor:
    """The tied layer's second use: its gradient is of the other sign, and the sum is exact in bf16."""
    return layer(x, -0.5)


def pipelined() -> PipelineModule:
    """Five layers, the first and the last of them one, on two stages."""
    tied: dict[str, Any] = {"tied_weight_attr": ["weight", "bias"]}
    ends = TiedLayerSpec("ends", Layer, "ends", **tied), TiedLayerSpec("ends", Layer, "ends", forward_fn=again, **tied)
    specs = [ends[0], *(LayerSpec(Layer, str(i)) for i in range(1, LAYERS - 1)), ends[1]]
    return PipelineModule(specs, num_stages=2, loss_fn=lambda x, _: x.sum(), partition_method="uniform")


def start(stage: int, dtype: str, options: dict[str, Any], accumulate: str | None = None) -> Any:
    """An engine; options that have "groups" are those of its JSON."""
    deepspeed.init_distributed("gloo")
    config = engine.config(stage, dtype, accumulate=MICRO)
    if accumulate:
        config["data_types"] = {"grad_accum_dtype": accumulate}
    model = pipelined()
    if "groups" in options:
        config["optimizer"] = {"type": "AlphaAdam", "params": {"lr": engine.LR, "weight_decay": 0.1, **options}}
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    optimizer = AlphaAdam(model.parameters(), lr=engine.LR, weight_decay=0.1, **options)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def steps(started: Any, first: int, last: int) -> list[Any]:
    global now
    seen = []
    for step in range(first, last):
        now = step
        batch = torch.zeros(1, 1), torch.zeros(1, 1)
        started.train_batch(data_iter=iter([batch] * MICRO))
        seen.append(engine.observe(started.basic_optimizer))
    return seen


def finished(started: Any, seen: list[Any]) -> dict[str, Any]:
    params = {name: param.detach().float().clone() for name, param in started.module.named_parameters()}
    started.destroy()
    return {"seen": seen, "params": params}


def given(stage: int, dtype: str, options: dict[str, Any], accumulate: str | None = None) -> dict[str, Any]:
    started = start(stage, dtype, options, accumulate)
    return finished(started, steps(started, 0, STEPS))


@cache
def alone(groups: str | None = None, **options: Any) -> dict[str, Any]:
    """One process that has every layer once."""
    layers = {"tied_modules.ends": "ends", **{str(i): str(i) for i in range(1, LAYERS - 1)}}
    named = {f"{at}.{name}": param for at, key in layers.items() for name, param in Layer(key).named_parameters()}
    entries = read(GROUPS[groups], AlphaAdam, "groups") if groups else []
    made = split([{"params": list(named.items())}], entries, {param: [name] for name, param in named.items()})
    optimizer = AlphaAdam(made, lr=engine.LR, weight_decay=0.1, **options)
    seen = []
    for step in range(STEPS):
        for key, param in named.items():
            layer, _, name = key.removeprefix("tied_modules.").rpartition(".")
            param.grad = values(layer, name, step) * (0.5 if layer == "ends" else 1.0)
        optimizer.step()
        seen.append(engine.observe(optimizer))
    return {"seen": seen, "params": {name: param.detach() for name, param in named.items()}}


def assert_one_process(ranks: list[dict[str, Any]], dtype: str, **options: Any) -> None:
    """Counts, alphas and parameters, bit for bit; a rank knows its own layers' names."""
    expected = alone(**options)
    for result in ranks:
        for (alpha, counts), (alpha_alone, counts_alone) in zip(result["seen"], expected["seen"], strict=True):
            assert counts == counts_alone
            assert alpha == ({k: alpha_alone[k] for k in alpha} if isinstance(alpha, dict) else alpha_alone)
        for name, param in result["params"].items():
            assert torch.equal(param, expected["params"][name].to(dtype_of(dtype)).float()), name
    assert {name for result in ranks for name in result["params"]} == expected["params"].keys()


OPTIONS: dict[str, dict[str, Any]] = {"exact": {}, "delayed": {"sync": "delayed"}, "layer": {"scope": "layer"}}
MODES = [(0, "fp32", None), (0, "bf16", None), (1, "fp32", None), (1, "bf16", None), (1, "bf16", "fp32")]


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulate", "setting"), nightly_but([(*m, o) for m, o in product(MODES, OPTIONS)], every=4)
)
def test_two_stages_are_one_process(
    ranks2: Ranks, stage: int, dtype: str, accumulate: str | None, setting: str
) -> None:
    options = OPTIONS[setting]
    assert_one_process(ranks2.run(given, stage, dtype, options, accumulate), dtype, **options)


@pytest.mark.parametrize(("stage", "dtype", "accumulate"), nightly_but(MODES, every=2))
def test_two_stages_of_two_ranks_are_one_process(ranks4: Ranks, stage: int, dtype: str, accumulate: str | None) -> None:
    """At stage 1 the copies of the tied layer are cut at other places on each stage."""
    assert_one_process(ranks4.run(given, stage, dtype, {}, accumulate), dtype)


def resumed(stage: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """As ``given``, but another engine goes on from a checkpoint after half the steps."""
    first = start(stage, "fp32", options)
    seen = steps(first, 0, SAVED_AFTER)
    first.save_checkpoint(folder, tag="t")
    first.destroy()
    second = start(stage, "fp32", options)
    second.load_checkpoint(folder, tag="t")
    return finished(second, seen + steps(second, SAVED_AFTER, STEPS))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_checkpoint_goes_on(ranks4: Ranks, tmp_path: Path, stage: int) -> None:
    assert_one_process(ranks4.run(resumed, stage, str(tmp_path), {}), "fp32")


GROUPS: dict[str, list[dict[str, Any]]] = {
    "on all stages": [
        {"match": r"(1|3)\.weight", "lr_scale": 4.0},
        {"match": "tied_modules.*weight", "lr_scale": 2.0},
    ],
    # only the first stage has a parameter of the first entry, and some that no entry names
    "on some": [
        {"match": r"1\.weight", "lr_scale": 4.0},
        {"match": "tied_modules", "lr_scale": 2.0},
        {"match": r"3\.|bias", "weight_decay": 0.0},
    ],
}


@pytest.mark.parametrize(("stage", "groups"), [(0, "on some"), (1, "on all stages")])
def test_groups_of_a_json_are_by_the_names_of_all_stages(
    ranks2: Ranks, tmp_path: Path, stage: int, groups: str
) -> None:
    options = {"groups": GROUPS[groups]}
    assert_one_process(ranks2.run(resumed, stage, str(tmp_path), options), "fp32", groups=groups)


def test_where_deepspeed_would_wait_for_ever(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match=r"(?s)other pipeline stages \(here 4\).*other pipeline stages \(here 2\)"):
        ranks2.run(given, 1, "fp32", {"groups": GROUPS["on some"]})


def test_a_pattern_that_no_stage_has_is_an_error_on_all(ranks2: Ranks) -> None:
    options = {"groups": [{"match": "4.weight", "lr_scale": 2.0}]}
    with pytest.raises(RankError, match=r"(?s)rank 0.*in no parameter's name.* 3\.weight.*rank 1.* 1\.weight"):
        ranks2.run(given, 0, "fp32", options)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_itself_has_no_pipelines_at_other_stages(ranks2: Ranks, stage: int) -> None:
    (cells,) = CELLS.values()
    with pytest.raises(RankError, match=cells[stage].says):
        ranks2.run(given, stage, "fp32", {})


# ---- a small model on real batches


class Words(nn.Embedding):
    """Tokens to vectors, and at the other end vectors to logits."""

    def __init__(self) -> None:
        super().__init__(67, 16)
        with torch.no_grad():
            self.weight.copy_(torch.randn(67, 16, generator=torch.Generator().manual_seed(3)))

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Two stages of two data-parallel ranks, each with its half of every batch, in two micro-batches."""
    deepspeed.init_distributed("gloo")
    blocks = [LayerSpec(Block, seed) for seed in range(3)]
    last = TiedLayerSpec("words", Words, forward_fn=Words.logits)
    specs = [TiedLayerSpec("words", Words), *blocks, last]
    model = PipelineModule(specs, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    config = {**engine.config(1, accumulate=MICRO), "zero_allow_untested_optimizer": True}
    started = deepspeed.initialize(model=model, optimizer=kind(model.parameters(), lr=1e-3), config=config)[0]
    half = started.grid.get_data_parallel_rank()
    for batch in token_batches(20, 8):
        started.train_batch(data_iter=iter([(part, part) for part in batch.chunk(2)[half].chunk(MICRO)]))
    return finished(started, [])


def train_alone(kind: type[torch.optim.Optimizer]) -> dict[str, Tensor]:
    words, blocks = Words(), nn.ModuleDict({str(i + 1): Block(i) for i in range(3)})
    named = {"tied_modules.words.weight": words.weight, **dict(blocks.named_parameters())}
    optimizer = kind(list(named.values()), lr=1e-3)
    for batch in token_batches(20, 8):
        x = words(batch)
        for block in blocks.values():
            x = block(x)
        loss_of(words.logits(x), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in named.items()}


def test_a_small_model_on_real_batches(ranks4: Ranks) -> None:
    far = {}
    for kind in (AlphaAdam, torch.optim.AdamW):
        ranks, one = ranks4.run(train, kind), train_alone(kind)
        held = {name: param for result in ranks for name, param in result["params"].items()}
        assert held.keys() == one.keys()
        far[kind] = deviation(held, one)
    print(f"\nPipelineModule at ZeRO-1: {far[AlphaAdam]:.1e} from one process; AdamW {far[torch.optim.AdamW]:.1e}")
    assert 0 < far[AlphaAdam] < max(5e-6, 10 * far[torch.optim.AdamW])
