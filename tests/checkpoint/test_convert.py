"""From DeepSpeed's universal checkpoints to DCP: the run goes on under FSDP2."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from typer.testing import CliRunner

from alphaadam_dist import AlphaAdam
from alphaadam_dist.cli import app
from alphaadam_dist.convert import convert
from tests.models import decay_groups, tiny_llama, token_batches
from tests.ranks import Ranks
from tests.zero.test_training import deviation

from .test_files import flip, truncate
from .test_universal import OPTIONS, SAVED_AFTER, STEPS, Saved, alphas_apart, awkward_llama

pytestmark = pytest.mark.slow


def go_on(folder: str, options: dict[str, Any], build: Callable[[int], nn.Module], train: bool) -> dict[str, Any]:
    """Load as docs/fsdp.md says, into other weights, and train to the end."""
    model: Any = build(1)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AlphaAdam(decay_groups(model), **options)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    result: dict[str, Any] = {
        "state_loaded": [group["alphaadam_state"] for group in optimizer.state_dict()["param_groups"]],
        "params_loaded": whole(model),
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "frozen": {n: p.full_tensor() for n, p in model.named_parameters() if not p.requires_grad},
    }
    alphas = []
    for batch in token_batches(STEPS, 4)[SAVED_AFTER:] if train else []:
        mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        alphas.append(optimizer.alpha)
    return result | {
        "alphas": alphas,
        "params": whole(model),
        "groups": [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups],
        "steps": {float(held["step"]) for held in optimizer.state.values()},
    }


def whole(model: Any) -> dict[str, Tensor]:
    return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_goes_on(ranks: list[dict[str, Any]], straight: dict[str, Any]) -> None:
    for resumed in ranks:
        assert resumed["state_loaded"] == straight["state_saved"]
        for name, expected in straight["params_saved"].items():
            assert torch.equal(resumed["params_loaded"][name], expected), name
        assert resumed["groups"] == [(0.1, 3e-3), (0.0, 3e-3)]
        assert resumed["steps"] == {STEPS}
        assert alphas_apart(resumed["alphas"], straight) < 0.3
        assert deviation(resumed["params"], straight["params"]) < 1e-5


@pytest.mark.parametrize(
    ("mode", "options"), [("zero2", "exact"), ("zero3", "exact"), ("zero3", "delayed"), ("zero2", "layer")]
)
def test_the_run_goes_on_under_fsdp2(ranks2: Ranks, saved: Saved, tmp_path: Path, mode: str, options: str) -> None:
    folder, straight = saved(mode, options)
    convert(folder / "universal", tmp_path / "dcp")
    assert_goes_on(ranks2.run(go_on, str(tmp_path / "dcp"), OPTIONS[options], tiny_llama, True), straight)


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_tied_and_frozen_parameters_and_buffers(ranks2: Ranks, saved: Saved, tmp_path: Path, mode: str) -> None:
    folder, straight = saved(mode, "exact", awkward_llama)
    convert(folder / "universal", tmp_path / "dcp")
    resumed = ranks2.run(go_on, str(tmp_path / "dcp"), OPTIONS["exact"], awkward_llama, True)
    assert_goes_on(resumed, straight)
    expected = awkward_llama(0)
    for rank in resumed:
        assert torch.equal(rank["buffers"]["scale"], expected.scale)
        ((name, frozen),) = rank["frozen"].items()
        assert torch.equal(frozen, expected.get_parameter(name))


def test_fp16_masters_are_taken_over(ranks2: Ranks, saved: Saved, tmp_path: Path) -> None:
    """fp32 from then on, so it trains another way; and the loss scale in the file is not needed."""
    folder, straight = saved("zero2-fp16", "exact")
    convert(folder / "universal", tmp_path / "dcp")
    for rank in ranks2.run(go_on, str(tmp_path / "dcp"), OPTIONS["exact"], tiny_llama, False):
        assert rank["state_loaded"] == straight["state_saved"]
        for name, expected in straight["params_saved"].items():
            assert torch.equal(rank["params_loaded"][name], expected), name


# ---- the command, and what it refuses


def run_command(*arguments: Any) -> tuple[int, str]:
    environment = {"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], env=environment)
    return result.exit_code, result.output


def test_the_command_converts(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("zero2", "exact")
    status, said = run_command(folder / "universal", tmp_path / "dcp")
    assert (status, [path.name for path in tmp_path.iterdir()]) == (0, ["dcp"]), said
    assert f"{tmp_path / 'dcp'} is written" in said


EXP_AVG = "zero/model.norm.weight/exp_avg.pt"
MODEL_STATES = "mp_rank_00_model_states.pt"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no universal checkpoint": ("zero", shutil.rmtree, "is no universal checkpoint, or a half-written one"),
    "half-written": (MODEL_STATES, Path.unlink, "no *_model_states.pt of rank 0: it is half-written"),
    "moments missing": (EXP_AVG, Path.unlink, "lacks model.norm.weight/exp_avg.pt: it is half-written"),
    "a bit flipped": (EXP_AVG, lambda path: flip(path, 0.3), f"{EXP_AVG} is damaged, the checksum"),
    "cut short": (EXP_AVG, truncate, f"{EXP_AVG} is damaged, it was cut short"),
    "of another shape": (EXP_AVG, lambda path: torch.save(torch.ones(5), path), f"{EXP_AVG} has shape (5,), the model"),
    "foreign objects": (
        MODEL_STATES,
        lambda path: torch.save({"args": argparse.Namespace()}, path),
        f"{MODEL_STATES} holds argparse.Namespace",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named(saved: Saved, tmp_path: Path, damage: str) -> None:
    folder, _ = saved("zero2", "exact")
    universal = shutil.copytree(folder / "universal", tmp_path / "universal")
    where, act, message = DAMAGES[damage]
    act(universal / where)
    status, said = run_command(universal, tmp_path / "dcp")
    assert status == 1
    assert message in said
    assert not (tmp_path / "dcp").exists()
    status, said = run_command(folder / "universal", tmp_path / "dcp")  # what was left behind is no obstacle
    assert status == 0, said


def test_an_existing_target_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("zero2", "exact")
    status, said = run_command(folder / "universal", tmp_path)
    assert status == 1
    assert f"{tmp_path} exists" in said
    assert os.listdir(tmp_path) == []
