"""FSDP1: what it is told apart by, and what a user must say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, _common_utils, _flat_param

from alphaadam_dist import AlphaAdam
from alphaadam_dist.shards import fsdp1
from tests.models import Given

from .. import threads
from ..equality import given, pieces


def sharded(original: bool, **options: Any) -> nn.Module:
    return given.fsdp1(Given(), use_orig_params=original, **options)


def refusal(function: Any, *args: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the caller looks at the message
        function(*args)
    return str(error.value)


def without_a_group(original: bool) -> str:
    return refusal(AlphaAdam, sharded(original).named_parameters())


@pytest.mark.parametrize("original", [True, False])
def test_a_missing_process_group_is_refused_at_construction(original: bool) -> None:
    for message in threads.run(2, without_a_group, original):
        assert "is a shard of FSDP1" in message
        assert "process_group=None: give the optimizer process_group=" in message


def wrapped_after_construction() -> str:
    model = Given()
    optimizer = AlphaAdam(model.named_parameters())
    wrapped = given.fsdp1(model, use_orig_params=True)
    wrapped({"norm": torch.ones(9)}).backward()
    return refusal(optimizer.step)


def test_a_missing_process_group_is_refused_at_the_first_step_where_fsdp1_came_later() -> None:
    assert all("is a shard of FSDP1" in message for message in threads.run(2, wrapped_after_construction))


def not_sharded() -> str:
    model = sharded(True, sharding_strategy=ShardingStrategy.NO_SHARD)
    return refusal(lambda: AlphaAdam(model.named_parameters(), process_group=dist.group.WORLD))


def test_no_shard_is_refused_with_the_way_out() -> None:
    """Every rank holds everything: summing over them would count it twice."""
    assert all("give sharding='replicated'" in message for message in threads.run(2, not_sharded))


def flat_shards(world_numel: int) -> Any:
    model = sharded(False)
    (flat,) = (p for n, p in model.named_parameters() if n.endswith("_flat_param"))
    held = fsdp1.shards(flat, "_flat_param", dist.get_rank())
    return [(s.key, s.place, s.start, s.numel, s.global_numel) for s in held], flat.numel()


def test_a_flat_parameter_knows_its_parts_and_not_its_padding() -> None:
    ranks = threads.run(4, flat_shards, 0)
    whole = {name: shape.numel() for name, shape in given.SHAPES.items() if name != "frozen"}
    found = dict.fromkeys(whole, 0)
    for held, numel in ranks:
        position = 0
        for key, (first, count), start, n, total in held:
            assert (start, n, total) == (position, count, whole[key])
            assert first == found[key], "parts follow each other from rank to rank"
            found[key] += n
            position += n
        assert position <= numel
    assert found == whole
    assert sum(numel for _, numel in ranks) > sum(whole.values()), "without padding this shows nothing"


def hybrid() -> Any:
    """Original parameters under HYBRID_SHARD: the shard group makes counts exact (all ranks would double them)."""
    model = sharded(True, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=given.mesh(replicate=2, shard=2))
    optimizer = AlphaAdam(model.named_parameters(), lr=given.LR, weight_decay=0.1, process_group=model.process_group)
    seen = []
    for gradients in given.given_gradients(10):
        given.give(model, gradients)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(given.observe(optimizer))
    return {"seen": seen, "params": pieces.of_model(model, given.SHAPES)}


def test_hybrid_shard_of_original_parameters_takes_the_shard_group() -> None:
    from ..equality.test_given import assert_equal

    assert_equal(threads.run(4, hybrid), "exact-0.0")


# ---- private names


def test_the_installed_torch_has_every_private_name() -> None:
    assert fsdp1.missing_names() == []


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        (_common_utils, "FSDP_FLATTENED", "_flattened", "the mark '_fsdp_flattened'"),
        (_common_utils, "FSDP_FLATTENED", None, "_common_utils.FSDP_FLATTENED"),
        (_flat_param, "FlatParameter", FullyShardedDataParallel, "the mark '_is_flat_param'"),
        (_flat_param, "_ShardParamInfo", tuple, "_ShardParamInfo.in_shard, _ShardParamInfo.offset_in_shard"),
        (_flat_param, "_ShardParamInfo", None, "_flat_param._ShardParamInfo"),
    ],
)
def test_a_name_that_torch_has_moved_is_an_error_not_a_guess(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any, said: str
) -> None:
    monkeypatch.setattr(fsdp1, "missing_names", fsdp1.missing_names.__wrapped__)  # anew, not what it was before
    if value is None:
        monkeypatch.delattr(where, name)
    else:
        monkeypatch.setattr(where, name, value)
    params = [nn.Parameter(torch.ones(3))]
    with pytest.raises(RuntimeError, match=r"no longer has .*torch>=2\.6,<=2\.15") as error:
        AlphaAdam(params)
    assert said in str(error.value)
    AlphaAdam(params, sharding="replicated")  # the way out that the message names


def flat_without(name: str) -> str:
    model = sharded(False)
    (flat,) = (p for n, p in model.named_parameters() if n.endswith("_flat_param"))
    delattr(flat, name)
    with pytest.raises(RuntimeError) as error:
        fsdp1.shards(flat, "_flat_param", 0)
    return str(error.value)


@pytest.mark.parametrize("name", fsdp1.FLAT_NAMES)
def test_a_flat_parameter_without_a_name_is_an_error(name: str) -> None:
    assert all(f"FlatParameter.{name}" in message for message in threads.run(2, flat_without, name))
