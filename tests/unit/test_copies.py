"""Copies and pickles of an optimizer that has a process group, which cannot be copied and cannot be pickled."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from alphaadam_dist import AlphaAdam

from .. import threads
from ..equality import given
from ..models import Given
from .problems import gradients, memory_of, parameters_of, same_bits, step_with, tensors


def through_a_file(optimizer: AlphaAdam) -> AlphaAdam:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    loaded: AlphaAdam = torch.load(file, weights_only=False)
    return loaded


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy}
PICKLES = {"pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)), "torch.save": through_a_file}


def of_fsdp1(original: bool) -> AlphaAdam:
    model = given.fsdp1(Given(), use_orig_params=original)
    return AlphaAdam(model.named_parameters(), lr=1e-2, process_group=dist.group.WORLD)


def of_stage() -> AlphaAdam:
    named = [(f"{dist.get_rank()}.{i}", nn.Parameter(p)) for i, p in enumerate(tensors(dist.get_rank()))]
    return AlphaAdam(named, lr=1e-2, process_group=dist.group.WORLD)


def of_shards() -> AlphaAdam:
    params = [nn.Parameter(p) for p in tensors(dist.get_rank(), shapes=[(4, 2)])]
    return AlphaAdam(params, lr=1e-2, sharding="sharded", process_group=dist.group.WORLD)


OPTIMIZERS: dict[str, Callable[[], AlphaAdam]] = {
    "FSDP1, original parameters": lambda: of_fsdp1(True),
    "FSDP1, flat parameters": lambda: of_fsdp1(False),
    "pipeline stage": of_stage,
    "sharded": of_shards,
}


def run(optimizer: AlphaAdam, first: int, last: int) -> None:
    params = parameters_of(optimizer)
    shapes = [tuple(p.shape) for p in params]
    for grads in gradients(last, shapes=shapes, seed=dist.get_rank())[first:]:
        step_with(optimizer, grads)


def goes_on(make: Callable[[], AlphaAdam], how: Callable[[AlphaAdam], AlphaAdam]) -> None:
    """The copy of an interrupted run does what the run would have done."""
    whole, first = make(), make()
    run(whole, 0, 6)
    run(first, 0, 3)
    twin = how(first)
    if twin._run.group_left_out:
        with pytest.raises(ValueError, match=r"set optimizer\.process_group"):
            twin.step()
        assert twin.alpha == first.alpha  # looking is no step
        twin.process_group = dist.group.WORLD
    assert twin.process_group is dist.group.WORLD
    run(twin, 3, 6)
    assert all(same_bits(p, q) for p, q in zip(parameters_of(twin), parameters_of(whole), strict=True))
    assert memory_of(twin) == memory_of(whole)
    assert twin.metrics() == whole.metrics()
    assert twin.metrics()["agreement"] < 1


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_copy_has_the_same_process_group(make: str, how: str) -> None:
    threads.run(2, goes_on, OPTIMIZERS[make], COPIES[how])


@pytest.mark.parametrize("how", PICKLES)
@pytest.mark.parametrize("make", [make for make in OPTIMIZERS if make != "FSDP1, flat parameters"])
def test_a_pickle_leaves_the_process_group_out_and_asks_for_it(make: str, how: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads.run(2, goes_on, OPTIMIZERS[make], PICKLES[how])
    ours = [str(w.message) for w in said if "pickled without its process_group" in str(w.message)]
    assert len(ours) == 2  # one on each rank
    assert "set optimizer.process_group before the next step" in ours[0]


def test_a_pickle_of_flat_parameters_of_fsdp1() -> None:
    """Without torch.save, which loads no list of FlatParameters again, AdamW's neither."""
    with pytest.warns(UserWarning, match="without its process_group"):
        threads.run(2, goes_on, OPTIMIZERS["FSDP1, flat parameters"], PICKLES["pickle"])


def test_a_pickle_without_a_process_group_says_nothing_and_a_missing_one_stays_missing() -> None:
    optimizer = AlphaAdam([nn.Parameter(torch.ones(2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert through_a_file(optimizer).process_group is None
    kept: dict[str, Any] = {**optimizer.__getstate__(), "group_left_out": True}
    lost = AlphaAdam.__new__(AlphaAdam)
    with pytest.warns(UserWarning, match="without its process_group"):
        lost.__setstate__(kept)
    for how in COPIES.values():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            twin = how(lost)
        with pytest.raises(ValueError, match=r"to None for all ranks"):
            twin.step()
        twin.process_group = None
        twin.step()
    with pytest.raises(ValueError, match="had a process_group"):
        lost.step()


def test_a_group_of_gloo_is_kept_by_reference() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        optimizer = AlphaAdam([("a", nn.Parameter(torch.ones(2)))], process_group=dist.group.WORLD)
        assert all(how(optimizer).process_group is dist.group.WORLD for how in COPIES.values())
        with pytest.warns(UserWarning, match="without its process_group"):
            pickle.loads(pickle.dumps(optimizer))
    finally:
        dist.destroy_process_group()


def test_a_shallow_copy_shares_parameters_and_moments_and_nothing_else() -> None:
    optimizer = AlphaAdam([nn.Parameter(p) for p in tensors(0)], lr=1e-2)
    for grads in gradients(4):
        step_with(optimizer, grads)
    saved, before = copy.deepcopy(optimizer.state_dict()), memory_of(optimizer)
    twin = copy.copy(optimizer)
    assert all(p is q for p, q in zip(parameters_of(twin), parameters_of(optimizer), strict=True))
    step_with(optimizer, gradients(5)[4])
    assert memory_of(twin) == before
    saved["param_groups"][0]["lr"] = 0.5
    twin.load_state_dict(saved)
    twin.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2]
    assert memory_of(optimizer)[0] == 5
    assert float(optimizer.state[parameters_of(optimizer)[0]]["step"]) == 5
