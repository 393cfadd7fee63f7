"""bf16 state saved by torch.distributed.checkpoint: on any number of ranks the run goes on with the same bits."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from alphaadam_dist import AlphaAdam
from tests.models import Given, given_gradients

from .. import threads
from ..equality import given, pieces
from ..unit.problems import parameters_of, same_bits, step_with

STEPS, SAVED_AFTER = 10, 5
BF16: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "state_dtype": "bfloat16"}
TRAINED = {name: shape for name, shape in given.SHAPES.items() if name != "frozen"}


def model(sharding: str, dtype: torch.dtype) -> nn.Module:
    bare = Given()
    del bare.tied, bare.frozen
    bare.to(dtype)
    world = dist.get_world_size()
    if sharding == "hsdp":
        return given.fsdp2(bare, given.mesh(replicate=2, shard=world // 2))
    return given.fsdp2(bare, given.mesh(dp=world)) if sharding == "fsdp2" else bare


def run(sharding: str, dtype: torch.dtype, options: dict[str, Any], folder: str, *, resume: bool) -> dict[str, Any]:
    """On a rank: all steps with a save on the way, or the rest after a load. What the rank then holds."""
    module = model(sharding, dtype)
    optimizer = AlphaAdam(module.named_parameters(), **BF16, **options)
    for step, gradients in enumerate(given_gradients(STEPS)):
        if step == SAVED_AFTER and folder:
            held_model, held_optimizer = get_state_dict(module, optimizer)
            state = {"model": held_model, "optimizer": held_optimizer}
            if resume:
                dcp.load(state, checkpoint_id=folder)
                set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            else:
                dcp.save(state, checkpoint_id=folder)
        if step >= SAVED_AFTER or not resume:
            given.give(module, gradients)
            optimizer.step()
            optimizer.zero_grad()
    named = pieces.clean(module)
    held = {
        "n": optimizer.state_dict()["param_groups"][0]["alphaadam_rounding"],
        "params": pieces.of_model(module, TRAINED),
    }
    for name in optimizer.moments:
        held[name] = pieces.pieces(named, TRAINED, {p: optimizer.state[p][name] for _, p in named})
    return held


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"sync": "delayed", "alpha_warmup": 6}], ids=["exact", "delayed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_on_four_ranks_goes_on_with_any_number(tmp_path: Path, dtype: torch.dtype, options: Any) -> None:
    (alone,) = threads.run(1, run, "plain", dtype, options, "", resume=False)
    threads.run(4, run, "fsdp2", dtype, options, str(tmp_path), resume=False)
    for sharding, world in (("fsdp2", 4), ("fsdp2", 3), ("fsdp2", 2), ("hsdp", 4), ("plain", 1)):
        ranks = threads.run(world, run, sharding, dtype, options, str(tmp_path), resume=True)
        for what in ("params", *AlphaAdam.moments):
            ours, one = (pieces.assemble([rank[what] for rank in some], TRAINED) for some in (ranks, [alone]))
            for name in TRAINED:
                assert same_bits(ours[name], one[name]), f"{what} of {name} on {world} ranks"
        assert ranks[0]["n"] == [1, STEPS]


# ---- in one process: other dtypes, other seeds, older files


def stepped(steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> AlphaAdam:
    generator = torch.Generator().manual_seed(0)
    params = [("a", nn.Parameter(torch.randn(40, generator=generator).to(dtype)))]
    optimizer = AlphaAdam(params, lr=1e-2, **options)
    for _ in range(steps):
        step_with(optimizer, [torch.randn(40, generator=generator).to(dtype)])
    return optimizer


def through_a_file(optimizer: AlphaAdam) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def moments(optimizer: AlphaAdam) -> list[torch.Tensor]:
    (param,) = parameters_of(optimizer)
    return [optimizer.state[param][name] for name in optimizer.moments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_state_is_kept_to_the_bit(dtype: torch.dtype) -> None:
    optimizer, other = stepped(4, dtype, state_dtype="bfloat16"), stepped(0, dtype, state_dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(through_a_file(optimizer))
    for ours, theirs in zip(moments(other), moments(optimizer), strict=True):
        assert same_bits(ours, theirs)
    assert other._run.n == 0
    assert other.state_dict()["param_groups"][0]["alphaadam_rounding"] == [1, 4]


def test_an_fp32_state_is_rounded_once_to_nearest_and_back_it_is_exact() -> None:
    wide, narrow = stepped(4), stepped(0, state_dtype="bfloat16")
    with pytest.warns(UserWarning, match="state_dtype=None; going on with state_dtype='bfloat16'") as told:
        narrow.load_state_dict(through_a_file(wide))
    assert len(told) == 1
    for ours, theirs in zip(moments(narrow), moments(wide), strict=True):
        assert same_bits(ours, theirs.bfloat16())
    step_with(narrow, [torch.ones(40)])
    again = stepped(0)
    with pytest.warns(UserWarning, match="state_dtype='bfloat16'; going on with state_dtype=None"):
        again.load_state_dict(through_a_file(narrow))
    for ours, theirs in zip(moments(again), moments(narrow), strict=True):
        assert same_bits(ours, theirs.float())


def test_another_seed_goes_on_with_one_warning() -> None:
    first, other = stepped(3, state_dtype="bfloat16"), stepped(0, state_dtype="bfloat16", rounding_seed=5)
    for optimizer in (first, other):
        optimizer.add_param_group({"params": [("b", nn.Parameter(torch.ones(2)))]})
    with pytest.warns(UserWarning, match="rounding_seed=0; going on with rounding_seed=5.*random bits") as told:
        other.load_state_dict(through_a_file(first))
    assert len(told) == 1


def test_a_state_without_a_count_begins_to_count() -> None:
    """AdamW's, or of a release before bf16 state."""
    held = through_a_file(stepped(3))
    for group in held["param_groups"]:
        for name in ("alphaadam_rounding", "state_dtype", "rounding_seed"):
            del group[name]
    other = stepped(0)
    other.load_state_dict(held)
    assert other.state_dict()["param_groups"][0]["alphaadam_rounding"] == [1, 0]


@pytest.mark.parametrize("value", [[2, 4], [1, -1], [1, 0.5], [1], "14", None])
def test_a_count_that_is_none_is_refused(value: Any) -> None:
    held = through_a_file(stepped(3, state_dtype="bfloat16"))
    held["param_groups"][0]["alphaadam_rounding"] = value
    with pytest.raises(ValueError, match=r"alphaadam_rounding=.*load it with the release that wrote it"):
        stepped(0, state_dtype="bfloat16").load_state_dict(held)


def test_a_pickle_of_an_older_release_gets_the_options_that_it_lacks() -> None:
    optimizer = stepped(2)
    held = optimizer.__getstate__()
    lacks = ("alphaadam_rounding", "state_dtype", "rounding_seed")
    for values in (held["defaults"], *held["param_groups"]):
        for name in lacks:
            del values[name]
    older = AlphaAdam.__new__(AlphaAdam)
    older.__setstate__(held)
    step_with(older, [torch.ones(40)])
    assert older.param_groups[0]["state_dtype"] is None
    assert older.state_dict()["param_groups"][0]["alphaadam_rounding"] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_parameters_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"parameter 'a' has dtype {dtype} and state_dtype='bfloat16'.*bfloat16"):
        stepped(0, dtype, state_dtype="bfloat16")
