"""All ranks of a model take the same kernels, also where one of them cannot have the fast ones."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from alphaadam_dist import AlphaAdam, kernels, parameters
from alphaadam_dist.kernels import consensus
from alphaadam_dist.options import FamilyOptions
from tests.models import Given, given_gradients
from tests.ranks import RankError, Ranks
from tests.zero import engine

from .. import threads
from ..equality import given

NO_COMPILER = "there is no compiler"


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make some ranks lack the fast kernels, and every model large."""

    def lack(*ranks: int) -> None:
        make_lack(monkeypatch, *ranks)

    return lack


def make_lack(patch: pytest.MonkeyPatch, *ranks: int) -> None:
    problem = kernels._problem
    patch.setattr(kernels, "SMALL", 100)
    patch.setattr(kernels, "_problem", lambda kind: NO_COMPILER if dist.get_rank() in ranks else problem(kind))


def kernels_of(optimizer: AlphaAdam) -> ModuleType:
    """Those of its last step, for the CPU."""
    assert optimizer._run.layout is not None
    return consensus.choose(optimizer._run.options, optimizer._run.layout, torch.device("cpu"))


def taken(regime: str, steps: int = 3, fused: Any = None, **options: Any) -> list[str]:
    """On a rank: which kernels each step took. ``fused`` may differ by rank."""
    _, shard, extra = given.REGIMES[regime]
    model = shard(Given())
    fused = fused[dist.get_rank()] if isinstance(fused, list) else fused
    optimizer = AlphaAdam(model.named_parameters(), fused=fused, **options, **extra())
    seen = []
    for gradients in given_gradients(steps):
        given.give(model, gradients)
        optimizer.step()
        seen.append(kernels_of(optimizer).__name__.rpartition(".")[2])
        optimizer.zero_grad()
    return seen


REGIMES = ("ddp", "fsdp2", "hsdp", "tp2-fsdp2", "fsdp1-original", "pipeline", "by-hand")


@pytest.mark.parametrize("regime", REGIMES)
def test_where_one_rank_has_none_all_take_the_reference(
    regime: str, lacking: Callable[..., None], said: dict[int, list[str]]
) -> None:
    lacking(2)
    assert threads.run(4, taken, regime) == [["reference"] * 3] * 4
    assert set(said) == {0, 1, 3}, "its own reason is in its own warning, which is patched away here"
    for messages in said.values():
        assert messages == [f"all ranks go on with {kernels.SLOWER}, as rank 2 has no others: {NO_COMPILER}"]


@pytest.mark.parametrize("regime", REGIMES)
def test_where_all_have_them_all_take_them(
    regime: str, lacking: Callable[..., None], said: dict[int, list[str]]
) -> None:
    lacking()
    assert threads.run(4, taken, regime) == [["cpu"] * 3] * 4
    assert said == {}


@pytest.mark.parametrize("regime", ["ddp", "fsdp2"])
def test_small_models_ask_nobody(regime: str, said: dict[int, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_problem", lambda kind: 1 / 0)
    assert threads.run(4, taken, regime) == [["reference"] * 3] * 4
    assert said == {}


def insisting() -> str:
    with pytest.raises(ValueError, match=f"fused=True, but {NO_COMPILER}. Or leave fused=None to go on") as error:
        taken("fsdp2", fused=True)
    return str(error.value)


def test_what_one_rank_insists_on_and_cannot_have_stops_all(lacking: Callable[..., None]) -> None:
    lacking(1)
    messages = threads.run(4, insisting)
    assert all(message.startswith("rank 1 of the reduce group found: fused=True") for message in messages[::2])
    assert messages[1].startswith("fused=True")


def test_a_rank_that_was_told_to_take_the_reference_takes_all_with_it(
    lacking: Callable[..., None], said: dict[int, list[str]]
) -> None:
    lacking()
    assert threads.run(4, taken, "fsdp2", fused=[None, False, None, None]) == [["reference"] * 3] * 4
    assert set(said) == {0, 2, 3}
    assert said[0][0].endswith("as rank 1 has no others: it was built with fused=False")
    said.clear()
    assert threads.run(4, taken, "fsdp2", fused=False) == [["reference"] * 3] * 4
    assert said == {}


def test_replicas_send_nothing_to_agree(lacking: Callable[..., None]) -> None:
    lacking(1)

    def sent() -> list[str]:
        param = nn.Parameter(torch.ones(200))
        with threads.Collectives() as building:
            optimizer = AlphaAdam([param])
        dist.barrier()  # as a backward under DDP, in which all take part
        param.grad = torch.ones(200)
        with threads.Collectives() as stepping:
            optimizer.step()
        assert kernels_of(optimizer) is kernels.reference
        return building.seen + stepping.seen

    assert threads.run(2, sent) == [[], []]


def only_on_rank_zero() -> str:
    if dist.get_rank() == 1:
        return ""
    param = nn.Parameter(torch.ones(200))
    optimizer = AlphaAdam([param])
    param.grad = torch.ones(200)
    optimizer.step()
    return kernels_of(optimizer).__name__.rpartition(".")[2]


@pytest.mark.parametrize(("without", "kind"), [((), "cpu"), ((0,), "reference"), ((1,), "cpu")])
def test_an_optimizer_on_one_rank_waits_for_nobody(without: Any, kind: str, lacking: Callable[..., None]) -> None:
    lacking(*without)
    assert threads.run(2, only_on_rank_zero)[0] == kind


def joined_by_a_group() -> list[str]:
    """Large only by the group that is added in mid-run."""
    params = [nn.Parameter(torch.ones(n)) for n in (60, 60)]
    optimizer = AlphaAdam([params[0]])
    seen = []
    for step in range(3):
        if step == 1:
            optimizer.add_param_group({"params": [params[1]]})
        dist.barrier()
        for param in params:
            param.grad = torch.ones(60)
        optimizer.step()
        seen.append(kernels_of(optimizer).__name__.rpartition(".")[2])
    return seen


@pytest.mark.parametrize(("without", "kind"), [((), "cpu"), ((1,), "reference")])
def test_a_model_that_grows_agrees_anew(without: Any, kind: str, lacking: Callable[..., None]) -> None:
    lacking(*without)
    assert threads.run(2, joined_by_a_group) == [["reference", kind, kind]] * 2


def test_a_world_without_a_store_lets_each_choose(
    lacking: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(1)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    assert [seen[0] for seen in threads.run(2, taken_by_replicas)] == ["cpu", "reference"]


def taken_by_replicas(**options: Any) -> list[str]:
    param = nn.Parameter(torch.ones(200))
    optimizer = AlphaAdam([param], **options)
    dist.barrier()
    param.grad = torch.ones(200)
    optimizer.step()
    return [kernels_of(optimizer).__name__.rpartition(".")[2]]


def test_verify_every_compares_the_kernels(lacking: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they could not agree: nobody has said a word in the store."""
    lacking(1)
    monkeypatch.setattr(consensus, "say", lambda *args: None)
    with pytest.raises(RankError, match="kernels is 'fast' on rank 0 but 'reference' on rank 1"):
        threads.run(2, taken_by_replicas, verify_every=1)


def test_the_choice_is_one_also_where_devices_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's parameters are on a kind of device that has no fast kernels."""

    class Elsewhere:
        device = torch.device("xla")

        def numel(self) -> int:
            return 200

    monkeypatch.setattr(kernels, "SMALL", 100)

    def settled() -> bool:
        optimizer = AlphaAdam([("a", nn.Parameter(torch.ones(200)))], process_group=dist.group.WORLD)
        layout = parameters.current_layout(optimizer)
        if dist.get_rank() == 1:
            layout.params = (Elsewhere(),)  # type: ignore[assignment]
            monkeypatch.setattr(consensus, "statistics_device", lambda *args: torch.device("cpu"))
        dist.barrier()
        consensus.settle(layout, FamilyOptions())
        return layout.reference

    assert threads.run(2, settled) == [True, True]


# ---- DeepSpeed's stage 0, whose replicas have no group either


def at_stage_zero(without: int) -> tuple[str, bool]:
    with pytest.MonkeyPatch.context() as patch:
        make_lack(patch, without)
        patch.setattr(consensus, "say", lambda *args: None)  # only what deepspeed.initialize asks
        started = engine.start(Given(), engine.config(0), {}, client=True, optimizer="AlphaAdam")
        optimizer = started.basic_optimizer
        result = kernels_of(optimizer).__name__.rpartition(".")[2], optimizer._run.layout.group is None
        started.destroy()
        return result


@pytest.mark.slow
@pytest.mark.parametrize(("without", "kind"), [(9, "cpu"), (1, "reference")])
def test_stage_zero_agrees_when_it_is_initialized(ranks2: Ranks, without: int, kind: str) -> None:
    assert ranks2.run(at_stage_zero, without) == [(kind, True)] * 2
