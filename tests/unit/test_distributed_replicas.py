"""AlphaAdam on plain tensors that are whole: replicas and DDP communicate nothing, pipeline stages count together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alphaadam_dist import AlphaAdam

from ..models import Given, decay_groups, given_gradients
from ..ranks import Ranks
from .collectives import Collectives
from .flats import LENGTHS, flats, steps_of
from .problems import memory_of, parameters_of, same_bits, step_with

# ---- replicas


def replicated(options: dict[str, Any]) -> tuple[list[Any], list[Any], int, list[float]]:
    """Plain tensors: what was communicated in all steps, the statistics, and the elements there are."""
    params = [nn.Parameter(p) for p in flats()]
    with Collectives() as seen:
        optimizer = AlphaAdam(params, **options)
        for grads in steps_of(4):
            step_with(optimizer, grads)
        agreement, memory = optimizer.agreement, memory_of(optimizer)
    evidence = sum(int((g != 0).sum()) for g in steps_of(4)[-1])
    return seen.calls, [agreement["agree"], agreement["conflict"]], evidence, memory


@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"sync": "delayed"}, {"clip_norm": 1.0}, {"sharding": "replicated"}], ids=str
)
def test_replicas_communicate_nothing_and_count_once(ranks2: Ranks, options: dict[str, Any]) -> None:
    for calls, counts, evidence, _ in ranks2.run(replicated, options):
        assert calls == []
        assert sum(counts) == evidence


def recorder_sees() -> list[Any]:
    with Collectives() as seen:
        dist.all_reduce(torch.ones(4, dtype=torch.float64))
        work = dist.all_reduce(torch.ones(2), async_op=True)
        work.wait()
        dist.all_gather_into_tensor(torch.empty(2), torch.ones(1))
    return seen.calls


def test_the_recorder_of_collectives_sees_them(ranks2: Ranks) -> None:
    for calls in ranks2.run(recorder_sees):
        assert [name for name, _ in calls] == ["allreduce", "allreduce", "_allgather_base"]
        assert [size for _, size in calls[:2]] == [32, 8]


# ---- DDP


def under_ddp(options: dict[str, Any]) -> tuple[list[str], list[Any], Any]:
    model, alone = Given(), Given()
    wrapped = DistributedDataParallel(model)
    ours = AlphaAdam(decay_groups(wrapped), lr=1e-2, **options)
    reference = AlphaAdam(decay_groups(alone), lr=1e-2, **options)
    calls: list[Any] = []
    for grads in given_gradients(5):
        for module, optimizer in ((wrapped, ours), (alone, reference)):
            optimizer.zero_grad()
            module(grads).backward()
            with Collectives() as seen:
                optimizer.step()
            calls += seen.calls
    wrong = [n for (n, p), q in zip(model.named_parameters(), alone.parameters(), strict=True) if not same_bits(p, q)]
    wrong += [] if memory_of(ours) == memory_of(reference) else ["memory"]
    wrong += [] if ours.alpha == reference.alpha else [f"alpha {ours.alpha} and {reference.alpha}"]
    return wrong, calls, ours.alpha


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"sync": "delayed"}, {"clip_norm": 1.0}], ids=str)
def test_ddp_is_one_process_and_adds_no_collective(ranks2: Ranks, options: dict[str, Any]) -> None:
    """The gradients are equal on both ranks, so their average is exact."""
    answers = ranks2.run(under_ddp, options)
    for wrong, calls, _ in answers:
        assert wrong == []
        assert calls == []
    assert answers[0][2] == answers[1][2] != 1.0
    if "scope" in options:
        assert set(answers[0][2]) == {"embedding", "weight", "norm", "bias", "one"}


# ---- pipeline stages: other parameters on every rank


def in_stages(options: dict[str, Any]) -> tuple[list[str], list[Any], Any]:
    """Parameters 0 and 2 on rank 0, 1 and 3 on rank 1, and a tied one on both; beside all of them in one process."""
    names = [f"p{i}" for i in range(len(LENGTHS))]
    here = [i for i in range(len(LENGTHS)) if i % 2 == dist.get_rank() or i == 0]
    params = [nn.Parameter(p) for p in flats()]
    whole = AlphaAdam(list(zip(names, params, strict=True)), lr=1e-2, **options)
    stage = AlphaAdam(
        [(names[i], nn.Parameter(flats()[i])) for i in here], lr=1e-2, process_group=dist.group.WORLD, **options
    )
    for grads in steps_of(8):
        with Collectives() as seen:
            step_with(stage, [grads[i] for i in here])
        step_with(whole, grads)
    wrong = [names[i] for i, p in zip(here, parameters_of(stage), strict=True) if not same_bits(p, params[i])]
    wrong += [] if memory_of(stage) == memory_of(whole) else [f"memory {memory_of(stage)} and {memory_of(whole)}"]
    wrong += [] if stage.agreement == whole.agreement else ["agreement"]
    expected = whole.alpha
    if isinstance(expected, dict):
        expected = {names[i]: expected[names[i]] for i in here}
    return wrong + ([] if stage.alpha == expected else ["alpha"]), seen.calls, memory_of(stage)[3]


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"sync": "delayed"}], ids=str)
def test_a_process_group_joins_pipeline_stages(ranks2: Ranks, options: dict[str, Any]) -> None:
    for wrong, calls, conflict in ranks2.run(in_stages, options):
        assert wrong == []
        assert calls == [("allreduce", 16 * len(LENGTHS) if "scope" in options else 16)]
        assert conflict > 0
