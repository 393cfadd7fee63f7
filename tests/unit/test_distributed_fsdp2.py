"""AlphaAdam over DTensors, as FSDP2 makes them: four ranks, uneven and empty shards, one process beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from alphaadam_dist import AlphaAdam, parameters
from alphaadam_dist.layout import Layout
from alphaadam_dist.statistics import Statistics
from tests.older import distributed

from ..marks import slow_but
from ..models import Given, decay_groups, given_gradients
from ..ranks import Ranks
from .collectives import Collectives
from .problems import memory_of, same_bits

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "threshold": {"threshold": 1 / 9},
    "layer": {"scope": "layer"},
    "delayed": {"sync": "delayed"},
    "gamma, warming": {"gamma": 0.3, "alpha_warmup": 5, "maximize": True},
}
STEPS = 6
NAMES = ("embedding", "weight", "norm", "bias", "one")


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    """One mesh of each shape in the life of a rank: its process groups are made once."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def sharded_by_fsdp(mesh: DeviceMesh) -> nn.Module:
    model = Given()
    fully_shard(model, mesh=mesh)
    return model


def sharded_by_hand(*placements: Placement, plain: tuple[str, ...] = ()) -> Callable[[DeviceMesh], nn.Module]:
    def shard(mesh: DeviceMesh) -> nn.Module:
        model = Given()
        for name, param in list(model.named_parameters()):
            if param.requires_grad and name not in plain:
                setattr(model, name, nn.Parameter(distributed(param.detach(), mesh, placements)))
        model.tied = model.embedding
        return model

    return shard


KINDS: dict[str, tuple[tuple[int, ...], Callable[[DeviceMesh], nn.Module]]] = {
    "fsdp2": ((4,), sharded_by_fsdp),
    "hsdp": ((2, 2), sharded_by_fsdp),
    "fsdp2, some plain": ((4,), sharded_by_hand(Shard(0), plain=("norm", "weight"))),
    "replicas and shards": ((2, 2), sharded_by_hand(Replicate(), Shard(0), plain=("one",))),
    "replicated": ((4,), sharded_by_hand(Replicate())),
}


def give(model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, param in model.named_parameters():
        if name in grads:
            value = grads[name].clone()
            if isinstance(param, DTensor):
                value = distributed(value, param.device_mesh, param.placements)
            param.grad = value


def run(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Steps with given gradients, sharded and in one process: what differs, what was communicated, what it says."""
    shape, shard = KINDS[kind]
    model, alone = shard(mesh_of(*shape)), Given()
    hyper: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), **options}
    ours, reference = AlphaAdam(decay_groups(model), **hyper), AlphaAdam(decay_groups(alone), **hyper)
    calls, wrong = [], []
    for grads in given_gradients(STEPS):
        give(model, grads)
        with Collectives() as seen:
            ours.step()
        calls.append(seen.calls)
        give(alone, grads)
        reference.step()
        if memory_of(ours) != memory_of(reference) or ours.alpha != reference.alpha:
            wrong.append(f"memory {memory_of(ours)} and {memory_of(reference)}")
        if ours.agreement != reference.agreement:
            wrong.append(f"agreement {ours.agreement} and {reference.agreement}")
    whole = dict(alone.named_parameters())
    for name, param in model.named_parameters():
        full = param.full_tensor() if isinstance(param, DTensor) else param
        if not same_bits(full.detach(), whole[name].detach()):
            wrong.append(f"{name}: {(full - whole[name]).abs().max()}")
    local = {n: p.to_local().numel() for n, p in model.named_parameters() if isinstance(p, DTensor)}
    return {"wrong": wrong, "calls": calls, "alpha": ours.alpha, "memory": memory_of(ours), "local": local}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", slow_but(KINDS, "fsdp2"))
def test_sharded_is_one_process_bit_for_bit(ranks4: Ranks, kind: str, mode: str) -> None:
    answers = ranks4.run(run, kind, MODES[mode])
    for answer in answers:
        assert answer["wrong"] == []
        assert answer["alpha"] == answers[0]["alpha"]
        assert answer["memory"] == answers[0]["memory"]
        assert answer["memory"][0] == STEPS
        assert answer["memory"][3] > 0
        size = 16 * len(NAMES) if mode == "layer" else 16
        for calls in answer["calls"][1:]:
            assert calls == ([] if kind == "replicated" else [("allreduce", size)])
    if mode == "layer":
        assert set(answers[0]["alpha"]) == set(NAMES)
    if kind == "fsdp2":
        # the shards really are uneven, and some hold nothing
        assert [answer["local"]["embedding"] for answer in answers] == [17 * 8, 17 * 8, 17 * 8, 16 * 8]
        assert [answer["local"]["one"] for answer in answers] == [1, 0, 0, 0]
        assert [answer["local"]["bias"] for answer in answers] == [1, 1, 1, 0]


def clipped(kind: str) -> tuple[float, float, int, float]:
    """Largest relative deviation from one process of a moment, of the parameters; collectives; alpha."""
    shape, shard = KINDS[kind]
    model, alone = shard(mesh_of(*shape)), Given()
    ours, reference = (AlphaAdam(decay_groups(m), lr=1e-2, clip_norm=0.5) for m in (model, alone))
    for grads in given_gradients(STEPS):
        give(model, grads)
        give(alone, grads)
        with Collectives() as seen:
            ours.step()
        reference.step()
    worst = [0.0, 0.0]
    whole = dict(alone.named_parameters())
    for name, param in model.named_parameters():
        if name in NAMES:
            pairs = (ours.state[param]["exp_avg"], reference.state[whole[name]]["exp_avg"]), (param, whole[name])
            for i, (held, b) in enumerate(pairs):
                a = held.full_tensor() if isinstance(held, DTensor) else held
                worst[i] = max(worst[i], float((a - b).norm() / b.norm()))
    assert isinstance(ours.alpha, float)
    return worst[0], worst[1], len(seen.calls), ours.alpha


@pytest.mark.parametrize("kind", ["fsdp2", "hsdp", "fsdp2, some plain"])
def test_clipping_by_the_norm_of_all_shards(ranks4: Ranks, kind: str) -> None:
    answers = ranks4.run(clipped, kind)
    for moment, param, calls, alpha in answers:
        # one bit of the float64 norm may become one bit of a float32 coefficient, 6e-8
        assert max(moment, param) < 1e-6
        assert (calls, alpha) == (1, answers[0][3])


# ---- the state


def state_is_sharded() -> list[str]:
    model = sharded_by_fsdp(mesh_of(4))
    optimizer = AlphaAdam(decay_groups(model))
    for grads in given_gradients(2):
        give(model, grads)
        optimizer.step()
    wrong = []
    for param, state in optimizer.state.items():
        if set(state) != {"step", "exp_avg", "exp_avg_sq"} or isinstance(state["step"], DTensor):
            wrong.append(str(state))
        for name in ("exp_avg", "exp_avg_sq"):
            assert isinstance(param, DTensor)
            if not isinstance(state[name], DTensor) or state[name].placements != param.placements:
                wrong.append(name)
    return wrong if len(optimizer.state) == len(NAMES) else ["parameters without a state"]


def test_moments_are_sharded_like_their_parameters(ranks4: Ranks) -> None:
    assert ranks4.run(state_is_sharded) == [[]] * 4


# ---- what is refused


def outcome_of(step: Callable[[], Any]) -> str:
    try:
        step()
    except ValueError as error:
        return str(error)
    return "no error"


def with_half_the_world() -> str:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = sharded_by_fsdp(mesh_of(4))
    optimizer = AlphaAdam(decay_groups(model), process_group=halves[dist.get_rank() // 2])
    give(model, given_gradients(1)[0])
    return outcome_of(optimizer.step)


def test_a_process_group_that_does_not_hold_the_model_is_refused_everywhere(ranks4: Ranks) -> None:
    held = ["34", "33"]  # rows of the embedding in the lower and in the upper half of the world
    for rank, message in enumerate(ranks4.run(with_half_the_world)):
        rows = int(held[rank // 2])
        assert "'embedding' has 536 elements" in message
        assert f"2 ranks of the reduce group hold {rows * 8} different ones" in message
        assert "process_group" in message


def partial_parameter() -> str:
    value = DTensor.from_local(torch.ones(4), mesh_of(4), [Partial()], run_check=False)
    return outcome_of(lambda: AlphaAdam([("w", nn.Parameter(value))]))


def partial_gradient() -> tuple[bool, dict[str, float]]:
    """One step with a gradient whose ranks hold summands: is the parameter that of AdamW on the whole gradient?"""
    mesh = mesh_of(4)
    summand = torch.linspace(-1, 1, 8)
    param = nn.Parameter(distributed(torch.ones(8), mesh, (Replicate(),)))
    optimizer = AlphaAdam([("w", param)])
    param.grad = DTensor.from_local(summand, mesh, [Partial()], run_check=False)
    optimizer.step()
    alone = nn.Parameter(torch.ones(8))
    alone.grad = 4 * summand
    torch.optim.AdamW([alone], lr=1e-3, foreach=False).step()
    return torch.equal(param.to_local(), alone), optimizer.agreement


def test_a_partial_parameter_is_refused_everywhere(ranks4: Ranks) -> None:
    for message in ranks4.run(partial_parameter):
        assert "summands" in message
        assert "Partial" in message


def test_a_partial_gradient_is_summed_first(ranks4: Ranks) -> None:
    for equal, agreement in ranks4.run(partial_gradient):
        assert equal
        assert agreement["agree"] == 8


# ---- the tests above can fail


@contextmanager
def every_rank_owns() -> Iterator[None]:
    real = parameters.build_layout

    def build(*args: Any, **kwargs: Any) -> Layout:
        layout = real(*args, **kwargs)
        segments = {p: tuple(replace(segment, owned=True) for segment in held) for p, held in layout.segments.items()}
        return replace(layout, segments=segments)

    parameters.build_layout = build
    try:
        yield
    finally:
        parameters.build_layout = real


@contextmanager
def no_all_reduce() -> Iterator[None]:
    real = Statistics._all_reduce
    Statistics._all_reduce = lambda self, tensor, async_op=False: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Statistics._all_reduce = real  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "every rank owns": every_rank_owns,
    "no all-reduce": no_all_reduce,
}


def run_broken(how: str, kind: str, options: dict[str, Any]) -> list[str]:
    with BREAKS[how]():
        wrong: list[str] = run(kind, options)["wrong"]
    return wrong


@pytest.mark.parametrize("kind", ["fsdp2, some plain", "replicas and shards"])
@pytest.mark.parametrize("sync", ["exact", "delayed"])
def test_a_replica_counted_twice_is_seen(ranks4: Ranks, kind: str, sync: str) -> None:
    assert ranks4.run(run_broken, "none", kind, {"sync": sync}) == [[]] * 4
    for wrong in ranks4.run(run_broken, "every rank owns", kind, {"sync": sync}):
        assert any(text.startswith("memory") for text in wrong)
        assert any(text.startswith("embedding") for text in wrong)


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_all_reduce_is_seen(ranks4: Ranks, mode: str) -> None:
    answers = ranks4.run(run_broken, "no all-reduce", "fsdp2", MODES[mode])
    for wrong in answers:
        assert any(text.startswith("memory") for text in wrong)
        assert any(text.startswith("embedding") for text in wrong)
