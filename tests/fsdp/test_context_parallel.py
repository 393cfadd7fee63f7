"""torch's context parallelism: ranks that share a sequence are FSDP2's shards too, on real batches.

On a CPU torch has it for attention that sees the whole sequence, written out in its operations (SDPBackend.MATH). The
kernel that a CPU takes for causal attention it does not know: a test sees that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from alphaadam_dist import AlphaAdam
from alphaadam_dist.optimizer import AlphaOptimizer
from tests.equality.llamas import deviation
from tests.models import token_batches
from tests.older import TORCH
from tests.ranks import RankError, Ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TORCH < (2, 13), reason="this torch was not tried with context parallelism"),
]

WIDTH, HEADS, LENGTH, STEPS, SAVED_AFTER, LR = 32, 4, 16, 20, 10, 1e-3


class Encoder(nn.Module):
    """Says which token stood at each place, from a text of which some are covered."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words, self.places = nn.Embedding(68, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
            self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 67)
        self.causal = False

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(places)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(-2)))


def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Covered tokens, places and the tokens themselves, (4, LENGTH) each."""
    generator = torch.Generator().manual_seed(5)
    for tokens in token_batches(STEPS, 4, LENGTH):
        covered = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.3, 67)
        yield covered, torch.arange(LENGTH).expand_as(tokens).clone(), tokens.clone()


@contextmanager
def shared(mesh: Any, buffers: list[Tensor]) -> Iterator[None]:
    """Each buffer is this rank's part of the sequence."""
    with sdpa_kernel(SDPBackend.MATH), context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
        yield


def start(kind: type[torch.optim.Optimizer], sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model, mesh = Encoder(), None
    if sharded:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        fully_shard(model, mesh=mesh["dp", "cp"]._flatten("dp_cp"))
    return model, kind(model.named_parameters(), lr=LR), mesh


def train(kind: type[torch.optim.Optimizer], sharded: bool, folder: str = "", causal: bool = False) -> dict[str, Any]:
    """Two ranks share a sequence, two share the batch. With a folder others go on from a checkpoint after half."""
    model, optimizer, mesh = start(kind, sharded)
    model.causal = causal
    seen: list[Any] = []
    for i, batch in enumerate(batches()):
        if folder and i == SAVED_AFTER:
            state = get_state_dict(model, optimizer)
            dcp.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder)
            model, optimizer, mesh = start(kind, sharded)
            state = get_state_dict(model, optimizer)
            dcp.load({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state[0], optim_state_dict=state[1])
        covered, places, tokens = (part.chunk(2)[mesh.get_local_rank("dp")].clone() if mesh else part for part in batch)
        with shared(mesh["cp"], [covered, places, tokens]) if mesh else nullcontext():
            F.cross_entropy(model(covered, places).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(optimizer, AlphaOptimizer):
            seen.append((optimizer.alpha, optimizer.agreement))
    params = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {"seen": seen, "params": {name: param.detach().clone() for name, param in params.items()}}


def test_an_encoder_equals_one_process(ranks4: Ranks) -> None:
    far = {}
    for kind in (AlphaAdam, torch.optim.AdamW):
        ranks, one = ranks4.run(train, kind, True), train(kind, False)
        assert all(rank["seen"] == ranks[0]["seen"] for rank in ranks)
        far[kind] = deviation(ranks[0]["params"], one["params"])
    print(f"\ncontext parallel: {far[AlphaAdam]:.1e} from one process; AdamW {far[torch.optim.AdamW]:.1e}")
    assert 0 < far[AlphaAdam] < max(5e-6, 10 * far[torch.optim.AdamW])


def test_a_checkpoint_goes_on(ranks4: Ranks, tmp_path: Path) -> None:
    whole, halves = ranks4.run(train, AlphaAdam, True), ranks4.run(train, AlphaAdam, True, str(tmp_path))
    for one, other in zip(whole, halves, strict=True):
        assert one["seen"] == other["seen"]
        assert all(torch.equal(one["params"][name], param) for name, param in other["params"].items())


def test_torch_has_no_causal_ring_on_a_cpu(ranks2: Ranks) -> None:
    """If this fails, let the encoder above be a decoder."""
    with pytest.raises(RankError, match=r"mixed torch\.Tensor and DTensor|sharding strategy"):
        ranks2.run(causal_attention)


def causal_attention() -> None:
    """As the optimizer plays no part in it, alone."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(1, 2, LENGTH, 4, generator=torch.Generator().manual_seed(0))
    with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
