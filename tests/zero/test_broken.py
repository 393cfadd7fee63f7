"""Tests of the tests: break what makes the whole model count, and the equality of test_equality.py must fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from alphaadam_dist import layout, rule, statistics
from alphaadam_dist.shards import Shard
from alphaadam_dist.step import Step
from alphaadam_dist.zero import internals
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_equality import MODES, assert_equal

pytestmark = pytest.mark.slow


def no_all_reduce(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(statistics.Statistics, "_all_reduce", lambda *args, **kwargs: None)


def padding_counts(patch: pytest.MonkeyPatch) -> None:
    classify = rule.classify

    def zeros_agree(grad: torch.Tensor, exp_avg: torch.Tensor, threshold: float = 0.0) -> Any:
        _, conflict = classify(grad, exp_avg, threshold)
        return ~conflict, conflict

    patch.setattr(rule, "classify", zeros_agree)


def boundary_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Each partition takes one element of its neighbour's for its own: names in the wrong place."""
    shards = internals.Stage1And2.shards

    def shifted(self: Any, names: Any) -> list[list[Shard]]:
        return [[dataclasses.replace(s, start=s.start - 1) for s in held[1:]] for held in shards(self, names)]

    patch.setattr(internals.Stage1And2, "shards", shifted)
    patch.setattr(layout, "_prove_coverage", lambda *args: None)


def counted_too_late(patch: pytest.MonkeyPatch) -> None:
    """Every partition counts for itself when it is stepped, after earlier ones have been."""
    count = Step.count

    def only_the_first(self: Step, gradients: Any, scale: Any = None) -> None:
        count(self, list(gradients)[:1], scale)

    patch.setattr(Step, "count", only_the_first)


def raw_gradients_meet_the_threshold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(internals, "unscale_factor", lambda zero, norm: 1.0)


def broken(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        globals()[name](patch)
        return engine.given(*args, **kwargs)


@pytest.mark.parametrize(
    ("fault", "mode", "options"),
    [
        (no_all_reduce, "zero2", {}),
        (no_all_reduce, "zero3-sub-groups", {"sync": "delayed"}),
        (padding_counts, "zero2", {}),
        (boundary_off_by_one, "zero2", {"scope": "layer"}),
        (counted_too_late, "zero2", {}),
        (counted_too_late, "zero3-sub-groups", {}),
    ],
)
def test_a_fault_is_seen(ranks2: Ranks, fault: Any, mode: str, options: dict[str, Any]) -> None:
    ranks = ranks2.run(broken, fault.__name__, MODES[mode], options)
    with pytest.raises(AssertionError):
        assert_equal(ranks, engine.given_alone(options))


@pytest.mark.parametrize("mode", ["zero2", "zero3-sub-groups"])
def test_the_threshold_needs_true_gradients(ranks2: Ranks, mode: str) -> None:
    options, clip = {"threshold": 0.1}, 1.0
    ranks = ranks2.run(
        broken, raw_gradients_meet_the_threshold.__name__, {**MODES[mode], "gradient_clipping": clip}, options
    )
    assert ranks[0]["seen"] != engine.given_alone(options, clip=clip)["seen"]


def test_overlapping_partitions_are_refused(ranks2: Ranks) -> None:
    """The coverage proof: an element that two ranks hold, or none, stops every rank."""
    with pytest.raises(Exception, match=r"embedding' has 536 elements, but the shards on the 2 ranks"):
        ranks2.run(overlapping, MODES["zero2"], {})


def overlapping(*args: Any) -> Any:
    shards = internals.Stage1And2.shards

    def longer(self: Any, names: Any) -> list[list[Shard]]:
        def wrong(shard: Shard) -> Shard:
            return dataclasses.replace(shard, numel=shard.numel + (shard.key == "embedding"))

        return [[wrong(shard) for shard in held] for held in shards(self, names)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals.Stage1And2, "shards", longer)
        return engine.given(*args)
