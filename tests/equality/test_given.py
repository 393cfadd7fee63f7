"""Whatever shards it, every count, every alpha and every parameter is that of one process, bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer

from .. import threads
from ..family import AlphaSignum
from ..marks import slow_but
from ..ranks import RankError
from . import given, pieces

FAST = ("plain", "ddp", "fsdp2", "tp", "fsdp1-flat", "by-hand")
FAMILY: dict[str, type[AlphaOptimizer]] = {"lion": AlphaLion, "sgd": AlphaSGD, "signum": AlphaSignum}


@cache
def alone(
    setting: str, kind: type[AlphaOptimizer] = AlphaAdam, grouped: bool = False
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    groups = given.GROUPS if grouped else None
    options = (given.SETTINGS | given.AHEAD)[setting]
    (result,) = threads.run(1, given.run, "plain", options, kind=kind, groups=groups)
    return result["seen"], pieces.assemble([result["params"]], given.SHAPES)


def assert_equal(
    ranks: list[dict[str, Any]], setting: str, kind: type[AlphaOptimizer] = AlphaAdam, grouped: bool = False
) -> None:
    """Counts, alphas and parameters are one process's, bit for bit; a rank may know a part of the layers' names."""
    seen, params = alone(setting, kind, grouped)
    for rank, result in enumerate(ranks):
        for step, ((alpha, counts), (alpha_alone, counts_alone)) in enumerate(zip(result["seen"], seen, strict=True)):
            assert counts == counts_alone, f"counts differ on rank {rank} at step {step}"
            if isinstance(alpha, dict):
                assert alpha == {key: alpha_alone[key] for key in alpha}, f"alphas differ on rank {rank} at step {step}"
                assert alpha
            else:
                assert alpha == alpha_alone, f"alpha differs on rank {rank} at step {step}"
    whole = pieces.assemble([result["params"] for result in ranks], given.SHAPES)
    for name, expected in params.items():
        assert torch.equal(whole[name], expected), f"{name} differs"


@pytest.mark.parametrize("setting", given.SETTINGS)
@pytest.mark.parametrize("regime", slow_but(given.REGIMES, *FAST))
def test_given_gradients(regime: str, setting: str) -> None:
    ranks = threads.run(given.REGIMES[regime][0], given.run, regime, given.SETTINGS[setting])
    assert_equal(ranks, setting)
    expected = [] if regime in given.REPLICATED else ["AllReduce"]
    for result in ranks:
        assert result["collectives"][1:] == [expected] * 9, "more than one collective a step"


@pytest.mark.parametrize("setting", ["exact-0.0", "delayed-0.1", "layer-0.0", "fast"])
@pytest.mark.parametrize("regime", given.FURTHER)
def test_further_shardings(regime: str, setting: str) -> None:
    ranks = threads.run(given.FURTHER[regime][0], given.run, regime, given.SETTINGS[setting])
    assert_equal(ranks, setting)
    expected = [] if regime in given.REPLICATED else ["AllReduce"]
    assert [rank["collectives"][1:] for rank in ranks] == [[expected] * 9] * len(ranks)


@pytest.mark.parametrize("setting", given.AHEAD)
@pytest.mark.parametrize("regime", slow_but(given.REGIMES, *FAST))
def test_looking_ahead(regime: str, setting: str) -> None:
    """With gamma 1 nothing is communicated, but for the norm that clips."""
    options = given.AHEAD[setting]
    ranks = threads.run(given.REGIMES[regime][0], given.run, regime, options)
    assert_equal(ranks, setting)
    silent = regime in given.REPLICATED or (options.get("gamma") == 1 and "clip_norm" not in options)
    for result in ranks:
        assert result["collectives"][1:] == [[] if silent else ["AllReduce"]] * 9


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("regime", slow_but(given.REGIMES, *FAST))
def test_the_family(regime: str, kind: str) -> None:
    """The other optimizers in every regime, each with the setting that falls to it."""
    setting = list(given.SETTINGS)[(list(given.REGIMES).index(regime) + list(FAMILY).index(kind)) % len(given.SETTINGS)]
    ranks = threads.run(given.REGIMES[regime][0], given.run, regime, given.SETTINGS[setting], kind=FAMILY[kind])
    assert_equal(ranks, setting, FAMILY[kind])


NOT_BY_NAME = ("pipeline", "fsdp1-flat", "fsdp1-flat-hybrid")  # a stage lacks names, FSDP1 has merged them


@pytest.mark.parametrize("setting", ["exact-0.0", "delayed-0.1", "layer-0.1", "fast"])
@pytest.mark.parametrize("regime", slow_but([name for name in given.REGIMES if name not in NOT_BY_NAME], *FAST))
def test_groups_by_name(regime: str, setting: str) -> None:
    """Each group with its own rate and decay; and one process without the groups ends elsewhere."""
    ranks = threads.run(given.REGIMES[regime][0], given.run, regime, given.SETTINGS[setting], groups=given.GROUPS)
    assert_equal(ranks, setting, grouped=True)
    of_groups, of_one = alone(setting, grouped=True)[1], alone(setting)[1]
    assert {name for name in of_one if torch.equal(of_groups[name], of_one[name])} == {"weight", "frozen"}


def test_parameters_that_fsdp1_has_merged_are_in_one_group_only() -> None:
    with pytest.raises(RankError, match=r"one parameter of embedding, .*one group only: .*use_orig_params=True"):
        threads.run(4, given.run, "fsdp1-flat", {}, groups=given.GROUPS)


def test_alpha_moves_and_settings_differ() -> None:
    """Else equality would show nothing."""
    for setting in given.SETTINGS:
        seen, _ = alone(setting)
        assert seen[1] != seen[-1]
    finals = {setting: alone(setting)[1]["weight"] for setting in given.SETTINGS | given.AHEAD}
    assert torch.equal(finals["ahead-alone"], finals.pop("ahead-clipped")), "nothing was cut"
    for one in finals:
        assert sum(torch.equal(finals[one], other) for other in finals.values()) == 1
