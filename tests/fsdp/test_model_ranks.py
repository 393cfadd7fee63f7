"""Which ranks are the model: told from the meshes where they are the world, asked for where they are less."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from alphaadam_dist import AlphaAdam
from tests.models import Given, given_gradients
from tests.older import before_2_7, distributed

from .. import threads
from ..equality import given, pieces

STEPS = 6
Named = Iterator[tuple[str, torch.Tensor]]


def trained(named: Named, gradient_seed: int = 1, **options: Any) -> tuple[list[Any], pieces.Pieces]:
    """What the optimizer reported in steps with given gradients, and what this rank then holds."""
    params = dict(named)
    optimizer = AlphaAdam(params.items(), lr=given.LR, weight_decay=0.1, **options)
    seen = []
    for gradients in given_gradients(STEPS, gradient_seed):
        for name, param in params.items():
            param.grad = pieces.local_part(gradients[name], param) if param.requires_grad else None
        optimizer.step()
        seen.append(given.observe(optimizer))
    return seen, pieces.pieces(params.items(), given.SHAPES, {param: param for param in params.values()})


def alone(model_seed: int = 0, gradient_seed: int = 1, **options: Any) -> tuple[list[Any], pieces.Pieces]:
    return trained(Given(model_seed).named_parameters(), gradient_seed, **options)


def assert_one_process(ranks: list[tuple[list[Any], pieces.Pieces]], expected: tuple[list[Any], pieces.Pieces]) -> None:
    """Alphas, counts and parameters of these ranks together, bit for bit."""
    assert expected[0][0] != expected[0][-1], "an alpha that stands still shows nothing"
    for seen, _ in ranks:
        assert seen == expected[0]
    whole, right = (pieces.assemble([held for _, held in some], given.SHAPES) for some in (ranks, [expected]))
    for name in given.SHAPES:
        assert torch.equal(whole[name], right[name]), name


def refusal(build: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match="process_group") as error:
        build()
    return str(error.value)


# ---- islands: models of their own on parts of one world


def island(told: bool, **options: Any) -> Any:
    mesh = given.mesh(island=2, shard=2)
    number = mesh.get_local_rank("island")
    model = given.fsdp2(Given(number), mesh["shard"])
    if not told:
        return refusal(lambda: AlphaAdam(model.named_parameters(), **options))
    group = mesh["shard"].get_group()
    return trained(model.named_parameters(), number + 1, process_group=group, verify_every=1, **options)


def test_islands_are_refused_at_construction_with_both_readings() -> None:
    for rank, message in enumerate(threads.run(4, island, False)):
        assert f"DTensors have ranks {'0, 1' if rank < 2 else '2, 3'} of a world of 4" in message
        assert "mesh.get_group() where the mesh has one dimension" in message
        assert "one pipeline stage: the group of all stages, with names that are unique in the whole model" in message


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"sync": "delayed"}], ids=str)
def test_each_island_is_one_process_with_its_group(options: dict[str, Any]) -> None:
    ranks = threads.run(4, island, True, **options)
    first, second = alone(0, 1, **options), alone(1, 2, **options)
    assert first[0] != second[0]
    assert_one_process(ranks[:2], first)
    assert_one_process(ranks[2:], second)


def island_of_replicas() -> Any:
    mesh = given.mesh(island=2, replicate=2, shard=2)
    number = mesh.get_local_rank("island")
    model = given.fsdp2(Given(number), mesh["replicate", "shard"])
    return trained(model.named_parameters(), number + 1, process_group=mesh["shard"].get_group())


def test_the_group_of_one_copy_is_enough_for_hsdp() -> None:
    ranks = threads.run(8, island_of_replicas)
    assert_one_process(ranks[:4], alone(0, 1))
    assert_one_process(ranks[4:], alone(1, 2))


# ---- a mesh smaller than the world


def on_two_of_three(told: bool) -> Any:
    mesh = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() == 2:
        return None  # it does something else, and never waits for the others
    named = given.fsdp2(Given(), mesh).named_parameters()
    if told:
        return trained(named, process_group=mesh.get_group())
    began = time.monotonic()
    return refusal(lambda: AlphaAdam(named)), time.monotonic() - began


def test_a_smaller_mesh_is_refused_at_once_and_nobody_waits() -> None:
    for message, seconds in threads.run(3, on_two_of_three, False)[:2]:
        assert "DTensors have ranks 0, 1 of a world of 3" in message
        assert seconds < 5


def test_a_smaller_mesh_is_one_process_with_its_group() -> None:
    assert_one_process(threads.run(3, on_two_of_three, True)[:2], alone())


def with_one_outside(told: str) -> Any:
    """All ranks build the model; rank 2 holds nothing of it."""
    mesh = DeviceMesh("cpu", [0, 1])
    model = Given()
    for name, param in list(model.named_parameters()):
        whole = distributed(param.detach(), mesh, [Split(0)])
        setattr(model, name, nn.Parameter(whole, requires_grad=param.requires_grad))
    model.tied = model.embedding
    if told == "world":
        return trained(model.named_parameters(), process_group=dist.group.WORLD)
    group = dist.new_group([0, 1])
    if told == "group" and dist.get_rank() < 2:
        return trained(model.named_parameters(), process_group=group)
    options = {} if told == "nothing" else {"process_group": group}
    return refusal(lambda: AlphaAdam(model.named_parameters(), **options))


def test_a_rank_outside_the_mesh_is_refused_too() -> None:
    assert all("ranks 0, 1 of a world of 3" in message for message in threads.run(3, with_one_outside, "nothing"))


def test_a_rank_outside_the_mesh_may_take_part() -> None:
    first, second, outside = threads.run(3, with_one_outside, "world")
    assert_one_process([first, second], alone())
    assert outside[0] == first[0]


def test_a_group_without_this_rank_is_refused() -> None:
    first, second, outside = threads.run(3, with_one_outside, "group")
    assert_one_process([first, second], alone())
    assert "process_group is a group without this rank, 2" in outside


def later_sharded() -> str:
    """As Accelerate does: the optimizer is built on plain parameters, which then become DTensors."""
    mesh = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() == 2:
        return ""
    model = Given()
    optimizer = AlphaAdam(model.named_parameters())
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return refusal(optimizer.step)


def test_what_is_sharded_after_construction_is_refused_at_the_first_step() -> None:
    for message in threads.run(3, later_sharded)[:2]:
        assert "ranks 0, 1 of a world of 3" in message


# ---- several meshes


def on_two_meshes() -> Any:
    """The embedding on ranks 0 and 1, the rest on 2 and 3: together they are the world."""
    meshes = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])
    model = Given()
    for name, param in list(model.named_parameters()):
        mesh = meshes[name != "embedding"]
        whole = distributed(param.detach(), mesh, [Split(0)])
        setattr(model, name, nn.Parameter(whole, requires_grad=param.requires_grad))
    model.tied = model.embedding
    return trained(model.named_parameters())


def test_meshes_that_are_the_world_together_need_no_group() -> None:
    ranks = threads.run(4, on_two_meshes)
    held = [(seen, {name: part for name, part in parts.items() if len(part[0])}) for seen, parts in ranks]
    assert_one_process(held, alone())


def tensor_parallel_in_plain_data_parallel(told: str) -> Any:
    mesh = given.mesh(dp=2, tp=2)
    model = given.tensor_parallel(Given(), mesh, None, norms=False)
    groups = {"tp": mesh["tp"].get_group(), "world": dist.group.WORLD}
    if told == "nothing":
        return refusal(lambda: AlphaAdam(model.named_parameters()))
    return trained(model.named_parameters(), process_group=groups[told])


def test_tensor_parallel_inside_plain_data_parallel_asks_for_its_group() -> None:
    for rank, message in enumerate(threads.run(4, tensor_parallel_in_plain_data_parallel, "nothing")):
        assert f"ranks {'0, 1' if rank < 2 else '2, 3'} of a world of 4" in message
    for group in ("tp", "world"):
        assert_one_process(threads.run(4, tensor_parallel_in_plain_data_parallel, group), alone())


def in_half_of_its_mesh() -> str:
    model = given.fsdp2(Given(), given.mesh(dp=4))
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    optimizer = AlphaAdam(model.named_parameters(), process_group=halves[dist.get_rank() // 2])
    return refusal(optimizer.step)


def test_a_group_that_leaves_out_a_part_of_the_model_is_refused() -> None:
    for message in threads.run(4, in_half_of_its_mesh):
        assert "but the shards on the 2 ranks of the reduce group hold" in message


# ---- replicated everywhere: as plain tensors


def replicated_on_two_of_three(**options: Any) -> Any:
    mesh = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() == 2:
        return None
    params = {}
    for name, param in Given().named_parameters():
        whole = distributed(param.detach(), mesh, [Replicate()])
        params[name] = nn.Parameter(whole, requires_grad=param.requires_grad)
    assert all(isinstance(param, DTensor) for param in params.values())
    if options.get("verify_every"):
        return refusal(lambda: AlphaAdam(params.items(), **options))
    with threads.Collectives() as counted:
        seen, _ = trained(iter(params.items()), **options)
    return seen, counted.seen


@before_2_7("sends a tensor to the ranks to make a DTensor of it, which this test would count")
def test_replicated_dtensors_reduce_nothing_whatever_their_mesh() -> None:
    for seen, collectives in threads.run(3, replicated_on_two_of_three)[:2]:
        assert seen == alone()[0]
        assert collectives == []


def test_but_a_check_needs_to_know_whom_to_ask() -> None:
    for message in threads.run(3, replicated_on_two_of_three, verify_every=1)[:2]:
        assert "ranks 0, 1 of a world of 3" in message
