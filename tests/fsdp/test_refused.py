"""Shardings that are refused, and what a user must say where nothing else can know."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor import Shard as Split

from alphaadam_dist import AlphaAdam

from .. import threads
from ..equality.given import mesh


def zero_redundancy(**options: object) -> str:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="each rank would get an alpha of its own") as error:
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AlphaAdam, lr=1e-3, **options)
    return str(error.value)


def test_zero_redundancy_optimizer_is_refused_with_the_way_out() -> None:
    for message in threads.run(2, zero_redundancy):
        assert "fully_shard(model, reshard_after_forward=False)" in message


def test_a_plain_optimizer_beside_it_is_not() -> None:
    AlphaAdam([nn.Parameter(torch.ones(2))])


def partial() -> str:
    param = nn.Parameter(DTensor.from_local(torch.ones(2), mesh(dp=2), [Partial()]))
    with pytest.raises(ValueError, match="Partial holds summands") as error:
        AlphaAdam([param])
    return str(error.value)


def test_partial_parameters_are_refused_at_construction() -> None:
    threads.run(2, partial)


def partial_gradient() -> torch.Tensor:
    """As AdamW takes them: summed. The optimizer leaves the sum in ``.grad``."""
    param = nn.Parameter(distribute_tensor(torch.zeros(4), mesh(dp=2), [Split(0)]))
    optimizer = AlphaAdam([param], lr=1.0, weight_decay=0.0)
    param.grad = DTensor.from_local(torch.full((4,), float(dist.get_rank() * 2 - 1.5)), mesh(dp=2), [Partial()])
    optimizer.step()
    assert param.grad.placements == (Split(0),)
    return torch.cat((param.grad.to_local(), param.detach().to_local()))


def test_partial_gradients_are_summed_first() -> None:
    for rank in threads.run(2, partial_gradient):
        assert rank[:2].tolist() == [-1.0, -1.0]  # -1.5 on one rank and 0.5 on the other
        assert rank[2:] == pytest.approx([1.0, 1.0])


def unnamed_stages() -> str:
    with pytest.raises(ValueError, match="plain tensors that have no names") as error:
        AlphaAdam([nn.Parameter(torch.ones(2))], process_group=dist.group.WORLD)
    return str(error.value)


def test_pipeline_stages_need_names() -> None:
    assert all("model.named_parameters()" in message for message in threads.run(2, unnamed_stages))


def test_sharded_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"sharding='sharded'.*init_process_group"):
        AlphaAdam([nn.Parameter(torch.ones(2))], sharding="sharded")


def equal_names_of_different_stages() -> str:
    named = [("weight", nn.Parameter(torch.ones(2 + dist.get_rank())))]
    optimizer = AlphaAdam(named, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="'weight'") as error:
        optimizer.step()
    return str(error.value)


def test_different_parameters_of_one_name_stop_every_rank_and_all_name_it() -> None:
    messages = threads.run(3, equal_names_of_different_stages)
    assert "has 3 elements, but the shards on the 3 ranks of the reduce group hold 2" in messages[1]
    assert "rank 1 of the reduce group found: parameter 'weight'" in messages[0]


def twice_on_one_rank() -> str:
    names = ["a", "a"] if dist.get_rank() == 1 else ["a", "b"]
    optimizer = AlphaAdam([(n, nn.Parameter(torch.ones(2))) for n in names], process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="two parameters are named 'a'") as error:
        optimizer.step()
    return str(error.value)


def test_a_name_twice_on_one_rank_stops_every_rank() -> None:
    assert len(threads.run(2, twice_on_one_rank)) == 2
