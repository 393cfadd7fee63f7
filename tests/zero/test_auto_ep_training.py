"""DeepSpeed's AutoEP with tokens that a router sends to experts on both ranks: rounding apart, one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.nn import functional as F

from alphaadam_dist import AlphaAdam
from tests.equality.llamas import deviation
from tests.models import token_batches
from tests.older import since_deepspeed
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.mixtral import LAYER, WIDTH, Mixtral, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_ranks_afterwards"),
    since_deepspeed("0.19.8", "has no such AutoEP"),
]

VOCABULARY = 67
STEPS, SAVED_AFTER, LR = 20, 10, 1e-3


class Model(Mixtral):
    """Words, the layer, and words again."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x, (layer,) = self.words(tokens), self.model.layers
        logits = self.head(x + layer.mlp(layer.norm(x)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def begin(stage: int, kind: str) -> Any:
    return start(Model(), stage, kind, lr=LR, **({"torch_adam": True} if kind == "AdamW" else {}))


def train(stage: int, kind: str, folder: str = "") -> dict[str, Any]:
    """Every rank on its share of each batch. With a folder another engine goes on from a checkpoint after half."""
    started, seen = begin(stage, kind), []
    for i, batch in enumerate(token_batches(STEPS, 8)):
        if folder and i == SAVED_AFTER:
            started.save_checkpoint(folder, tag="t")
            started.destroy()
            started = begin(stage, kind)
            started.load_checkpoint(folder, tag="t")
        started.backward(started(batch.chunk(dist.get_world_size())[dist.get_rank()]))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    held = {
        name: (safe_get_full_fp32_param(param) if stage == 3 else param).detach().clone()
        for name, param in started.module.named_parameters()
    }
    sent = started.module.get_submodule(LAYER).tokens_per_expert.tolist()
    started.destroy()
    return {"seen": seen, "params": held, "sent": sent}


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The model of the first two ranks, which have two of the experts each, by its names before AutoEP."""
    first, second = (rank["params"] for rank in ranks[:2])
    up, down, gate = (torch.cat([held[f"{LAYER}.experts.{w}"] for held in (first, second)]) for w in ("w3", "w2", "w1"))
    named = {name.replace("router.gate", "gate"): param for name, param in first.items() if ".experts." not in name}
    experts = {f"{LAYER}.experts.gate_up_proj": torch.cat((gate, up), 1), f"{LAYER}.experts.down_proj": down}
    return {**named, **experts}


def train_alone(kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    model, seen = Model(), []
    optimizer = kind(model.named_parameters(), lr=LR, weight_decay=0.1)
    for batch in token_batches(STEPS, 8):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(engine.observe(optimizer))
    return {"seen": seen, "params": {name: param.detach() for name, param in model.named_parameters()}}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_small_model_on_real_batches(ranks4: Ranks, stage: int) -> None:
    far, begun = {}, {name: param.detach() for name, param in Model().named_parameters()}
    for kind in (AlphaAdam, torch.optim.AdamW):
        ranks, one = ranks4.run(train, stage, kind.__name__), train_alone(kind)
        assert all(rank["seen"] == ranks[0]["seen"] for rank in ranks)
        assert min(ranks[0]["sent"]) > 0, "an expert without tokens shows nothing"
        if kind is AlphaAdam:
            assert [a for a, _ in ranks[0]["seen"]] == pytest.approx([a for a, _ in one["seen"]], abs=1e-3)
            assert ranks[0]["seen"][-1][0] > 1.1
        assert deviation(one["params"], begun) > 1e-3
        far[kind] = deviation(whole(ranks), one["params"])
    print(f"\nAutoEP at ZeRO-{stage}: {far[AlphaAdam]:.2e} from one process; AdamW {far[torch.optim.AdamW]:.2e}")
    assert 0 < far[AlphaAdam] < max(1e-6, 10 * far[torch.optim.AdamW])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_goes_on(ranks4: Ranks, tmp_path: Path, stage: int) -> None:
    through = ranks4.run(train, stage, "AlphaAdam")
    for one, other in zip(through, ranks4.run(train, stage, "AlphaAdam", str(tmp_path)), strict=True):
        assert one["seen"] == other["seen"]
        for name, param in one["params"].items():
            assert torch.equal(other["params"][name], param), name
