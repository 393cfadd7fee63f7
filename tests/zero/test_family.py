"""AlphaLion, AlphaSGD and the optimizer of docs/algorithm.md under ZeRO: one process's bits, and what the JSON says."""

from __future__ import annotations

from typing import Any

import pytest

from alphaadam_dist import AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer
from alphaadam_dist.zero import register
from tests.family import AlphaSignum
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import MODES, OPTIONS, assert_equal, dtype_of

SGD: dict[str, Any] = {"momentum": 0.8, "nesterov": True}


def given_with(optimizer: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """``engine.given``, with what the document adds registered, as a user does after defining it."""
    register(AlphaSignum)
    return engine.given(*args, optimizer=optimizer, **kwargs)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        (AlphaLion, "zero2", "exact"),
        (AlphaLion, "zero3-sub-groups", "threshold"),
        (AlphaLion, "zero2-bf16", "layer"),
        (AlphaSGD, "zero1", "layer"),
        (AlphaSGD, "zero2-offload", "threshold"),
        (AlphaSGD, "zero3-offload", "delayed"),
        (AlphaSGD, "zero0-bf16", "exact"),
    ],
)
def test_two_ranks_equal_one_process(ranks2: Ranks, kind: type[AlphaOptimizer], mode: str, options: str) -> None:
    own = {**OPTIONS[options], **(SGD if kind is AlphaSGD else {})}
    ranks = ranks2.run(given_with, kind.__name__, MODES[mode], own)
    assert_equal(ranks, engine.given_alone(own, optimizer=kind, dtype=dtype_of(mode)))
    assert ranks[0]["seen"][0] != ranks[0]["seen"][-1]


@pytest.mark.parametrize(
    ("kind", "mode", "own"),
    [
        (AlphaLion, "zero3-sub-groups", {"betas": [0.8, 0.9]}),
        (AlphaSGD, "zero2", SGD),
        (AlphaSignum, "zero2", {"beta": 0.8}),
    ],
)
def test_named_in_the_json(ranks2: Ranks, kind: type[AlphaOptimizer], mode: str, own: dict[str, Any]) -> None:
    """With no_decay the groups of the client: matrices decay, the rest does not."""
    words = ["norm", "bias", "one"]
    ranks = ranks2.run(given_with, kind.__name__, MODES[mode], {**own, "no_decay": words}, client=False)
    assert_equal(ranks, engine.given_alone(own, optimizer=kind))


def test_an_option_that_is_another_optimizers(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match=r"TypeError: AlphaSGD has no option 'betas' \(=\[0\.9, 0\.99\]\)"):
        ranks2.run(given_with, "AlphaSGD", MODES["zero2"], {"betas": [0.9, 0.99]}, client=False)
