"""Tests of the tests: break what makes every element count once, and the equality of test_given.py must fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from alphaadam_dist import layout, parameters, replicas, statistics
from alphaadam_dist.shards import Shard, dtensor, fsdp1, select

from .. import threads
from . import given
from .test_given import alone, assert_equal


def no_all_reduce(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(statistics.Statistics, "_all_reduce", lambda *args, **kwargs: None)


def no_proof(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "_prove_coverage", lambda *args: None)
    patch.setattr(replicas, "prove", lambda *args: None)


def replicas_count_twice(patch: pytest.MonkeyPatch) -> None:
    """A rank's coordinate on replicated mesh dimensions taken for a part of the parameter."""

    def every_coordinate(param: DTensor, key: str) -> list[Shard]:
        part = tuple(enumerate(param.device_mesh.get_coordinate() or ()))
        return [Shard(key, part, 0, param.to_local().numel(), param.numel())]

    patch.setattr(dtensor, "shards", every_coordinate)


def coordinate_zero_owns(patch: pytest.MonkeyPatch) -> None:
    """Own what lies at coordinate 0 of every replicated dimension of its own mesh; plain tensors on rank 0."""
    build = layout.build_layout

    def owns(param: Any) -> bool:
        if not isinstance(param, DTensor):
            return dist.get_rank() == 0
        coordinate = param.device_mesh.get_coordinate() or ()
        return all(
            at == 0 for at, placement in zip(coordinate, param.placements, strict=True) if placement.is_replicate()
        )

    def built(*args: Any, **kwargs: Any) -> layout.Layout:
        layout = build(*args, **kwargs)
        for param, segments in layout.segments.items():
            layout.segments[param] = tuple(dataclasses.replace(segment, owned=owns(param)) for segment in segments)
        return layout

    patch.setattr(parameters, "build_layout", built)


def padding_is_a_parameter(patch: pytest.MonkeyPatch) -> None:
    of_flat = fsdp1._of_flat

    def longer(flat: Any, key: str) -> list[Shard]:
        *held, last = of_flat(flat, key)
        return [*held, dataclasses.replace(last, numel=flat.numel() - last.start)]

    patch.setattr(fsdp1, "_of_flat", longer)


def shards_taken_for_replicas(patch: pytest.MonkeyPatch) -> None:
    """FSDP1's mark not seen: every rank's piece looks like the whole."""
    patch.setattr(select.fsdp1, "marked", lambda param: False)


def refusal(regime: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the caller looks at the message
        given.run(regime, {})
    return str(error.value)


Fault = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("fault", "regime", "setting"),
    [
        (no_all_reduce, "fsdp2", "exact-0.0"),
        (no_all_reduce, "hsdp", "delayed-0.0"),
        (no_all_reduce, "tp2-fsdp2", "layer-0.1"),
        (no_all_reduce, "fsdp1-original", "exact-0.1"),
        (no_all_reduce, "pipeline", "exact-0.0"),
        (coordinate_zero_owns, "tp2-fsdp2", "exact-0.0"),
        (coordinate_zero_owns, "hsdp-tp", "delayed-0.0"),
    ],
)
def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch, fault: Fault, regime: str, setting: str) -> None:
    alone(setting)  # before anything is broken
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="differ"):
        assert_equal(threads.run(given.REGIMES[regime][0], given.run, regime, given.SETTINGS[setting]), setting)


@pytest.mark.parametrize(
    ("fault", "regime"),
    [
        (replicas_count_twice, "hsdp"),
        (replicas_count_twice, "hsdp-tp"),
        (padding_is_a_parameter, "fsdp1-flat"),
        (shards_taken_for_replicas, "fsdp1-original"),
    ],
)
@pytest.mark.parametrize("proof", [True, False], ids=["proof", "no proof"])
def test_the_proof_stops_a_wrong_layout_and_without_it_counts_differ(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, regime: str, proof: bool
) -> None:
    alone("exact-0.0")
    fault(monkeypatch)
    world = given.REGIMES[regime][0]
    if proof:
        for message in threads.run(world, refusal, regime):
            assert "elements, but the shards on the" in message
        return
    no_proof(monkeypatch)
    with pytest.raises(AssertionError, match="differ"):
        assert_equal(threads.run(world, given.run, regime, {}), "exact-0.0")


def test_coordinate_zero_is_right_where_every_mesh_is_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the wrong rule is tempting, and that the fault above breaks nothing else."""
    alone("exact-0.0")
    coordinate_zero_owns(monkeypatch)
    assert_equal(threads.run(4, given.run, "hsdp", {}), "exact-0.0")
