"""State and parameters in bf16, stochastically rounded: any sharding is one process, bit for bit, moments too."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, rounding
from alphaadam_dist.optimizer import AlphaOptimizer
from alphaadam_dist.shards import dtensor

from .. import threads
from ..family import AlphaSignum
from ..marks import nightly_but
from ..older import distributed
from ..ranks import RankError
from . import given, pieces

FAMILY: dict[str, type[AlphaOptimizer]] = {"adam": AlphaAdam, "lion": AlphaLion, "sgd": AlphaSGD, "signum": AlphaSignum}
BF16: dict[str, Any] = {"state_dtype": "bfloat16"}
SETTINGS = {name: {**given.SETTINGS[name], **BF16} for name in ("exact-0.0", "delayed-0.1", "layer-0.0", "fast")}
SETTINGS["ahead"] = {"lookahead": 0.25, "sync": "delayed", **BF16}
UNKNOWN = ("fsdp1-original", "by-hand")
KNOWN = [regime for regime in given.REGIMES if regime not in (*UNKNOWN, "plain")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINED = {name: shape for name, shape in given.SHAPES.items() if name != "frozen"}


@cache
def alone(setting: str, kind: str, dtype: str) -> dict[str, Any]:
    (result,) = threads.run(1, given.run, "plain", SETTINGS[setting], kind=FAMILY[kind], dtype=DTYPES[dtype])
    return result  # type: ignore[no-any-return]


def differences(regime: str, setting: str, kind: str, dtype: str) -> list[str]:
    """What of a sharded run is not one process's."""
    expected = alone(setting, kind, dtype)
    world = given.REGIMES[regime][0]
    ranks = threads.run(world, given.run, regime, SETTINGS[setting], kind=FAMILY[kind], dtype=DTYPES[dtype])
    wrong = [] if ranks[0]["seen"][-1][1] == expected["seen"][-1][1] else ["counts"]
    for what in ("params", *FAMILY[kind].moments):
        if what not in ranks[0]:
            continue
        shapes = given.SHAPES if what == "params" else TRAINED
        ours, one = (pieces.assemble([result[what] for result in some], shapes) for some in (ranks, [expected]))
        kept = DTYPES[dtype] if what == "params" else torch.bfloat16
        assert all(values.dtype == kept for values in ours.values())
        wrong += [f"{what} of {name}" for name in one if not torch.equal(ours[name], one[name])]
    return wrong


@pytest.mark.parametrize(("dtype", "setting", "regime"), nightly_but(product(DTYPES, SETTINGS, KNOWN), every=2))
def test_given_gradients(regime: str, setting: str, dtype: str) -> None:
    """AlphaAdam with "exact" and where it looks ahead, one of the family with each other setting."""
    which = 0 if setting in ("exact-0.0", "ahead") else KNOWN.index(regime) + list(SETTINGS).index(setting)
    assert differences(regime, setting, list(FAMILY)[which % len(FAMILY)], dtype) == []


def test_settings_and_seeds_differ() -> None:
    """Else equality would show nothing."""
    ends = [alone(setting, "adam", "bf16")["params"]["weight"][1] for setting in SETTINGS]
    (other,) = threads.run(1, given.run, "plain", {**SETTINGS["exact-0.0"], "rounding_seed": 1}, dtype=torch.bfloat16)
    ends.append(other["params"]["weight"][1])
    for one in ends:
        assert sum(torch.equal(one, end) for end in ends) == 1


def test_a_local_generator_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others do: the same seed on every rank, drawn from in the order of the local elements."""

    def drawn(key: int, positions: Any, numel: int, *, n: int, tensor: int, device: Any = None) -> Tensor:
        return torch.randint(2**16, (numel,), generator=torch.Generator().manual_seed(3 * n + tensor))

    monkeypatch.setattr(rounding, "random_bits", drawn)
    alone.cache_clear()
    try:
        assert differences("ddp", "exact-0.0", "adam", "bf16") == []
        assert differences("fsdp2", "exact-0.0", "adam", "bf16") != []
        assert differences("tp", "exact-0.0", "adam", "bf16") != []
    finally:
        alone.cache_clear()


# ---- where a shard's elements stand


def knows_where(placements: list[Any], shape: tuple[int, ...]) -> bool:
    """Whether this rank knows where its elements stand. That what it knows is true is asserted."""
    over = given.mesh(a=2, b=2)
    indices = torch.arange(torch.Size(shape).numel()).view(shape)
    part = distributed(indices, over, placements)
    at = dtensor.positions(part, over.get_coordinate() or [])
    if at is None:
        return False
    held = part.to_local().reshape(-1)
    j = torch.arange(held.numel())
    assert torch.equal(held, at.start + j // at.inner * at.stride + j % at.inner)
    return True


@pytest.mark.parametrize(
    ("placements", "shape", "known"),
    [
        ([Shard(0), Replicate()], (7, 5), True), ([Shard(1), Replicate()], (7, 5), True),
        ([Shard(0), Shard(1)], (7, 5), True), ([Shard(1), Shard(0)], (7, 5), True),
        ([Shard(0), Shard(0)], (7, 5), True), ([Shard(0), Shard(0)], (3,), True), ([Replicate()] * 2, (), True),
        ([Replicate(), Shard(2)], (3, 4, 5), True), ([Shard(0), Shard(2)], (4, 3, 5), True),
        ([Shard(1), Shard(2)], (1, 4, 5), True), ([Shard(1), Shard(2)], (2, 4, 4), False),
        ([Shard(0), Replicate()], (1,), True),
    ],
)  # fmt: skip
def test_a_dtensor_knows_where_its_elements_stand(placements: list[Any], shape: tuple[int, ...], known: bool) -> None:
    assert threads.run(4, knows_where, placements, shape) == [known] * 4


@pytest.mark.parametrize("regime", UNKNOWN)
def test_a_shard_whose_place_is_unknown_is_refused(regime: str) -> None:
    with pytest.raises(RankError, match=r"state_dtype='bfloat16'.*use_orig_params=False"):
        threads.run(4, given.run, regime, SETTINGS["exact-0.0"])


def split_thrice() -> None:
    whole = distributed(torch.ones(2, 4, 4), given.mesh(a=2, b=2), [Shard(1), Shard(2)])
    AlphaAdam([("w", nn.Parameter(whole))], **BF16)


def test_rows_of_several_distances_are_refused() -> None:
    with pytest.raises(RankError, match=r"parameter 'w' is a shard of which nobody knows.*state_dtype=None"):
        threads.run(4, split_thrice)
