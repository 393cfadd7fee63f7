"""The main job through the real launcher: killed, resumed, and the same as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from alphaadam_dist.training import checkpoints, metrics
from alphaadam_dist.training.corpus import load_corpus
from alphaadam_dist.training.data import byte_level_bpe
from alphaadam_dist.training.models import load_model
from alphaadam_dist.training.settings import TINY

STEPS = 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A small corpus, so that the job is mostly start-up."""
    source = Path(os.__file__).parent
    for package in ("json", "logging", "collections", "concurrent", "html", "urllib"):
        shutil.copytree(source / package, tmp_path / "text" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "text"


def _command(text: Path, out: Path, *more: str) -> list[str]:
    groups = out.parent / "groups.json"
    groups.write_text(json.dumps([{"match": "embed", "lr_scale": 2.0}, {"match": "norm", "weight_decay": 0.0}]))
    small = ["--steps", str(STEPS), "--batch", "2", "--block", "32", "--gpus", "2", "--data", str(text)]
    small += ["--groups", str(groups)]
    return [str(Path(sys.executable).parent / "alphaadam"), "train", *small, "--out", str(out), *more]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_killed_job_resumes_as_if_nothing_had_happened(text: Path, cache: Path, tmp_path: Path):
    """First the command is killed, and the ranks with it; then one rank, in the middle of the all-reduce."""
    out, calm = tmp_path / "run", tmp_path / "calm"
    with subprocess.Popen(_command(text, out, "--no-compare"), stdout=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 240
        while checkpoints.step_of(checkpoints.last_complete(out / "alphaadam")) < 2:
            assert killed.poll() is None, "the job ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
    faulty = [sys.executable, "-m", "tests.faults.faulty_job", *_command(text, out, "--no-compare", "--resume")[1:]]
    environment = {**os.environ, "FAULT": f"all-reduce:1:2:{tmp_path}"}
    lost = subprocess.run(faulty, capture_output=True, text=True, timeout=900, env=environment)
    assert lost.returncode == 1, lost.stderr
    assert "all-reduce of the counts of this process's step 2 failed on rank 0 of ranks 0, 1" in lost.stderr
    assert "not heard from: rank 1, which died" in lost.stderr
    assert lost.stderr.strip().count("\n") == 0, "one line, and no traceback"
    resumed = subprocess.run(
        _command(text, out, "--no-compare", "--resume"), capture_output=True, text=True, timeout=900
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "AlphaAdam goes on from step" in resumed.stdout

    whole = subprocess.run(_command(text, calm), capture_output=True, text=True, timeout=900)
    assert whole.returncode == 0, whole.stderr
    for phrase in ("AlphaAdam", "look-ahead", "AdamW", "held-out loss", "on held-out text", "losses.png"):
        assert phrase in whole.stdout

    curve = _curve(out / "alphaadam")
    assert [step for step, _, _ in curve] == list(range(1, STEPS + 1))
    assert curve == _curve(calm / "alphaadam")
    assert all("alpha" in entry and "agreement" in entry for entry in _training(calm / "alphaadam"))
    assert not any("alpha" in entry for entry in _training(calm / "adamw"))
    assert not any("agreement" in entry for entry in _training(calm / "lookahead")), "it has no masks"
    # The first step of all is AdamW's, so the first two losses are equal; then they part.
    ours, ahead, baseline = (_curve(calm / name) for name in ("alphaadam", "lookahead", "adamw"))
    assert ours[:2] == ahead[:2] == baseline[:2]
    assert len({ours[-1], ahead[-1], baseline[-1]}) == 3
    for folder in (out / "alphaadam", calm / "alphaadam", calm / "lookahead", calm / "adamw"):
        assert checkpoints.last_complete(folder) == folder / f"checkpoint-{STEPS}"
        assert any((folder / "tensorboard").iterdir())
    assert (calm / "losses.png").stat().st_size > 20_000


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_pretrained_model_from_a_local_folder_trains_at_zero_3(text: Path, cache: Path, tmp_path: Path):
    tokenizer = byte_level_bpe(load_corpus(str(text)), 300)
    tokenizer.save_pretrained(tmp_path / "model")
    load_model(TINY, tokenizer, 32, torch.float32).save_pretrained(tmp_path / "model")
    command = _command(text, tmp_path / "run", "--no-compare", "--zero", "3", "--model", str(tmp_path / "model"))
    trained = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert trained.returncode == 0, trained.stderr
    assert [step for step, _, _ in _curve(tmp_path / "run" / "alphaadam")] == list(range(1, STEPS + 1))


def _training(folder: Path) -> list[metrics.Entry]:
    return [entry for entry in metrics.read(folder / metrics.FILE_NAME) if "loss" in entry]


def _curve(folder: Path) -> list[tuple[int, float, float]]:
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in _training(folder)]
