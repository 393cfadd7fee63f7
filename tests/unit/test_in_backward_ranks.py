"""The step in backward on several ranks: under DDP after its all-reduce, under FSDP2 after its reduce-scatter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from alphaadam_dist import AlphaAdam, in_backward

from ..marks import slow_but
from ..models import Given, decay_groups, given_gradients
from ..ranks import Ranks
from .collectives import Collectives
from .problems import memory_of, same_bits

STEPS = 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks that may be recomputed, a tied head, and a block that the second rank leaves out where ``uneven``."""

    def __init__(self, *, recompute: bool = False, uneven: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.recompute, self.uneven = recompute, uneven

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in list(self.blocks)[: 2 if self.uneven and dist.get_rank() == 1 else 3]:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def by_ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def by_fsdp(model: nn.Module, hybrid: bool = False, **options: Any) -> nn.Module:
    world = dist.get_world_size()
    mesh = mesh_of(world, 1) if hybrid else mesh_of(world)
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def by_fsdp_in_parts(model: nn.Module) -> nn.Module:
    """Without a root over all, which a tied head would need: each part ends its backward by itself."""
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())  # type: ignore[union-attr, operator]
    for part in (model.embedding, *model.blocks, model.head):  # type: ignore[misc]
        fully_shard(part, mesh=mesh_of(dist.get_world_size()))
    return model


def by_tp(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh_of(dist.get_world_size()), {"up": ColwiseParallel(), "down": RowwiseParallel()})  # type: ignore[arg-type]
    return model


KINDS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any]]] = {
    "ddp": (by_ddp, {}, {}),
    "ddp, views of buckets": (by_ddp, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}, {}),
    "ddp, unused": (by_ddp, {"find_unused_parameters": True}, {"uneven": True}),
    "ddp, static graph": (by_ddp, {"static_graph": True}, {"recompute": True}),
    "fsdp2": (by_fsdp, {}, {}),
    "fsdp2, recomputed": (by_fsdp, {}, {"recompute": True}),
    "fsdp2, kept": (by_fsdp, {"reshard_after_forward": False}, {}),
    "fsdp2, bf16": (by_fsdp, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}, {}),
    "fsdp2, offloaded": (by_fsdp, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {}),
    "fsdp2, several roots": (by_fsdp_in_parts, {}, {}),
    "hsdp": (by_fsdp, {"hybrid": True}, {}),
    "tp": (by_tp, {}, {}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checked": {"verify_every": 2, "gamma": 0.3},
    "bf16 state": {"state_dtype": "bfloat16"},
}


def made(kind: str, options: dict[str, Any]) -> tuple[nn.Module, AlphaAdam]:
    wrap, how, of_model = KINDS[kind]
    model = wrap(Net(**of_model), **how)
    return model, AlphaAdam(decay_groups(model), lr=1e-2, sync="delayed", **options)


def trained(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Steps on batches of each rank's own: what differs from step(), how many all-reduces of counts, what was alive."""
    (model, ours), (other, theirs) = made(kind, options), made(kind, options)
    ours.step_in_backward(model)
    alive: list[int] = []
    if not isinstance(model, DistributedDataParallel):
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(param.grad is not None for param in model.parameters()))
            )
    generator = torch.Generator().manual_seed(0 if kind == "tp" else dist.get_rank())
    counted, wrong = [], []
    for step in range(STEPS):
        tokens = torch.randint(11, (3, 5), generator=generator)
        for one, optimizer in ((model, ours), (other, theirs)):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            with Collectives() as seen:
                nn.functional.cross_entropy(one(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
                optimizer.step()
            optimizer.zero_grad()
            counted.append(sum(size == 16 and "allreduce" in name for name, size in seen.calls))
        if memory_of(ours) != memory_of(theirs) or ours.alpha != theirs.alpha:
            wrong.append(f"memory {memory_of(ours)} and {memory_of(theirs)}")
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        mine, its = (p.to_local() if isinstance(p, DTensor) else p for p in (a.detach(), b.detach()))
        wrong += [] if same_bits(mine, its) else [name]
    return {"wrong": wrong, "counted": counted, "alive": max(alive, default=0), "alpha": ours.alpha}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", slow_but(KINDS, "ddp", "fsdp2", "tp"))
def test_it_is_step_after_backward(ranks2: Ranks, kind: str, options: str) -> None:
    answers = ranks2.run(trained, kind, OPTIONS[options])
    for answer in answers:
        assert answer["wrong"] == []
        assert answer["alpha"] == answers[0]["alpha"] > 1
        assert answer["alive"] <= 1, "gradients that were not freed when the next came"
        if "verify_every" not in OPTIONS[options]:
            answer["counted"].pop(1)  # the first step() has the handshake in it
            assert answer["counted"] == [0 if "ddp" in kind else 1] * (2 * STEPS - 1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_on_one_rank(ranks1: Ranks, kind: str) -> None:
    (answer,) = ranks1.run(trained, kind, {})
    assert answer["wrong"] == []


def offloaded() -> dict[str, Any]:
    """As on a GPU, where gradients are on their way to the CPU when the hooks are called: all wait for the end."""
    model, _ = made("fsdp2", {})
    with mock.patch.object(DeviceMesh, "device_type", property(lambda _: "cuda"), create=True):
        assert all(map(in_backward._offloaded, model.parameters()))
    assert not any(map(in_backward._offloaded, model.parameters()))
    with mock.patch.object(in_backward, "_offloaded", return_value=True):
        return trained("fsdp2", {})


def test_offloaded_parameters_wait_for_the_end(ranks2: Ranks) -> None:
    for answer in ranks2.run(offloaded):
        assert answer["wrong"] == []
        assert answer["alive"] > 1


def given(wrap: str) -> list[str]:
    """With given gradients: what differs from step() in one process."""
    model, alone = Given(), Given()
    wrapped = by_fsdp(model) if wrap == "fsdp2" else by_ddp(model)
    ours, reference = (AlphaAdam(decay_groups(m), lr=1e-2, sync="delayed") for m in (wrapped, alone))
    ours.step_in_backward(wrapped)
    for grads in given_gradients(STEPS):
        wrapped(grads).backward()
        ours.step()
        alone(grads).backward()
        reference.step()
        reference.zero_grad()
    whole = dict(alone.named_parameters())
    wrong = [] if memory_of(ours) == memory_of(reference) else ["memory"]
    for name, param in model.named_parameters():
        full = param.full_tensor() if isinstance(param, DTensor) else param
        wrong += [] if same_bits(full.detach(), whole[name].detach()) else [name]
    return wrong


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_sharded_it_is_one_process(ranks2: Ranks, wrap: str) -> None:
    assert ranks2.run(given, wrap) == [[], []]


# ---- what is refused


def refused(how: str) -> str:
    """The message of the error."""
    options: dict[str, Any] = {"lr": 1e-2, "sync": "delayed"}
    model = Net()
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    try:
        if how == "nobody averages":
            AlphaAdam(model.named_parameters(), **options).step_in_backward(model)
        elif how == "some are not averaged":
            both = nn.ModuleList([DistributedDataParallel(model), nn.Linear(2, 2)])
            AlphaAdam(both.named_parameters(), **options).step_in_backward(both)
        elif how == "fsdp2, ignored":
            fully_shard(model, mesh=mesh_of(2), ignored_params={model.blocks[0].norm.weight})  # type: ignore[union-attr, arg-type]
            AlphaAdam(model.named_parameters(), **options).step_in_backward(model)
        elif how == "no_sync":
            wrapped = DistributedDataParallel(model)
            optimizer = AlphaAdam(wrapped.named_parameters(), **options)
            optimizer.step_in_backward(wrapped)
            with wrapped.no_sync():
                wrapped(tokens).sum().backward()
        elif how == "accumulated":
            wrapped = DistributedDataParallel(model)
            optimizer = AlphaAdam(wrapped.named_parameters(), **options)
            optimizer.step_in_backward(wrapped)
            for _ in range(2):
                wrapped(tokens).sum().backward()
        else:
            from torch.distributed.fsdp import FullyShardedDataParallel

            wrapped = FullyShardedDataParallel(
                model, device_id=torch.device("cpu"), use_orig_params=how == "fsdp1, original"
            )
            optimizer = AlphaAdam(wrapped.named_parameters(), process_group=dist.group.WORLD, **options)
            optimizer.step_in_backward(wrapped)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nobody averages", "nothing averages its gradient inside the backward"),
        ("some are not averaged", "several of which hold all of parameter '1.weight'"),
        ("fsdp2, ignored", "several of which hold all of parameter 'blocks.0.norm.weight'"),
        ("no_sync", "no_sync(), whose gradients are of this rank alone"),
        ("accumulated", "a second backward() before the step()"),
        ("fsdp1, original", "is a shard of FSDP1"),
        ("fsdp1, flat", "is a shard of FSDP1"),
    ],
)
def test_it_says_why_not(ranks2: Ranks, how: str, says: str) -> None:
    for message in ranks2.run(refused, how):
        assert says in message


def wrapped_later() -> list[str]:
    """DDP writes gradients of its own behind the hooks. On several ranks it is refused before."""
    model = Net()
    optimizer = AlphaAdam(decay_groups(model), lr=1e-2, sync="delayed")
    optimizer.step_in_backward(model)
    wrapped = by_ddp(model)
    said = []
    for _ in range(2):
        wrapped(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_a_model_that_ddp_wraps_later(ranks1: Ranks) -> None:
    (said,) = ranks1.run(wrapped_later)
    assert said
    for message in said:
        assert "has a gradient after it was stepped" in message
        assert "as DistributedDataParallel wraps it" in message


def accumulated_by_fsdp() -> list[str]:
    """FSDP2 keeps the gradients of a backward without reduction to itself: the next one steps with their sum."""
    (model, ours), (other, theirs) = made("fsdp2", {}), made("fsdp2", {})
    ours.step_in_backward(model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        for last in (False, True):
            tokens = torch.randint(11, (3, 5), generator=generator)
            for one in (model, other):
                one.set_requires_gradient_sync(last)
                one(tokens).sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    return [name for (name, a), b in pairs if not same_bits(a.to_local().detach(), b.to_local().detach())]


@pytest.mark.slow
def test_fsdp2_accumulates_by_itself(ranks2: Ranks) -> None:
    assert ranks2.run(accumulated_by_fsdp) == [[], []]
