"""From DeepSpeed's universal checkpoints to DCP: the run goes on under FSDP2."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
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
from alphaadam_dist.zero.convert import convert
from alphaadam_dist.zero.universal import read
from tests.models import decay_groups, tiny_llama, token_batches
from tests.ranks import Ranks
from tests.zero.test_training import deviation

from .test_files import flip, largest_file, truncate
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


def contents(universal: Path, path: Path) -> Any:
    """All that `convert` takes from one of the files."""
    if path.parent.parent.name == "zero" and path.name != "step.pt":
        return read(universal).tensor(path.parent.name, path.stem)
    held = read(universal)
    return held.shapes, held.steps, held.others, held.tied, held.groups


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype and a.shape == b.shape and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def outcome(universal: Path, path: Path, whole: Any) -> str:
    try:
        return "the same" if same(contents(universal, path), whole) else f"{path} gives other values without a word"
    except ValueError as error:
        is_named = str(path) in str(error) and "make it again" in str(error)
        return "named" if is_named else f"{path} is not named: {error}"


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_a_flipped_bit_is_named_with_its_file_or_changes_nothing(saved: Saved, tmp_path: Path, mode: str) -> None:
    """Half of the bits are in the zip's directory, at the end, which no checksum covers."""
    universal = shutil.copytree(saved(mode, "exact", awkward_llama)[0] / "universal", tmp_path / "universal")
    random = Random(mode)
    files = sorted(path for path in universal.rglob("*.pt"))
    seen = set()
    for path in [*random.sample(files, 10), *universal.glob("*.pt"), universal / "zero/optimizer_state.pt"]:
        whole, held = contents(universal, path), path.read_bytes()
        for _ in range(8):
            at = random.choice([random.randrange(len(held)), random.randrange(max(0, len(held) - 900), len(held))])
            flipped = bytearray(held)
            flipped[at] ^= 1 << random.randrange(8)
            path.write_bytes(flipped)
            seen.add(outcome(universal, path, whole))
        path.write_bytes(held)
    assert seen == {"named", "the same"}


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_a_whole_file_in_the_place_of_another_is_named(saved: Saved, tmp_path: Path, mode: str) -> None:
    universal = shutil.copytree(saved(mode, "exact")[0] / "universal", tmp_path / "universal")
    norm, proj = (universal / "zero" / f"model.{name}.weight" for name in ("norm", "layers.0.mlp.up_proj"))
    swaps = [
        (norm / "fp32.pt", proj / "fp32.pt"),
        (norm / "exp_avg.pt", proj / "exp_avg.pt"),
        (norm / "exp_avg_sq.pt", norm / "exp_avg.pt"),  # squares are not negative
        (norm / "exp_avg.pt", universal / "zero/optimizer_state.pt"),
        (next(iter(sorted(universal.glob("*.pt")))), universal / "zero/optimizer_state.pt"),
    ]
    if mode == "zero2":
        swaps.append((norm / "step.pt", norm / "fp32.pt"))
        down = universal / "zero" / "model.layers.0.mlp.down_proj.weight"
        swaps.append((proj / "exp_avg.pt", down / "exp_avg.pt"))  # as many elements, the other way round
    for one, other in swaps:
        held = one.read_bytes(), other.read_bytes()
        one.write_bytes(held[1]), other.write_bytes(held[0])
        with pytest.raises(ValueError, match="make it again") as error:
            convert(universal, tmp_path / "dcp")
        assert any(str(swapped) in str(error.value) for swapped in (one, other))
        one.write_bytes(held[0]), other.write_bytes(held[1])
    convert(universal, tmp_path / "dcp")


def test_what_is_in_the_way_is_named_and_stays(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("zero2", "exact")
    (tmp_path / "dcp.partial").mkdir()
    (tmp_path / "dcp.partial" / "mine").write_text("my work")
    status, said = run_command(folder / "universal", tmp_path / "dcp")
    assert status == 1
    assert f"{tmp_path / 'dcp.partial'} exists: remove it if it is not needed" in said
    assert (tmp_path / "dcp.partial" / "mine").read_text() == "my work"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path / 'link'} exists" in run_command(folder / "universal", tmp_path / "link")[1]


def test_a_system_that_refuses_to_write_is_named_with_the_file(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("zero2", "exact")
    with largest_file(1 << 16):
        status, said = run_command(folder / "universal", tmp_path / "dcp")
    assert status == 1
    last = said.strip().splitlines()[-1]
    assert re.search(rf"Error: {tmp_path}/dcp.partial/\S+: file too large: allow larger files", last), last
    assert os.listdir(tmp_path) == [], "what it wrote itself is gone"
    (tmp_path / "file").touch()
    status, said = run_command(folder / "universal", tmp_path / "file" / "dcp")
    assert status == 1
    assert f"{tmp_path}/file/dcp.partial: not a directory: a part of this path is a file" in said


def test_an_existing_target_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("zero2", "exact")
    status, said = run_command(folder / "universal", tmp_path)
    assert status == 1
    assert f"{tmp_path} exists" in said
    assert os.listdir(tmp_path) == []
