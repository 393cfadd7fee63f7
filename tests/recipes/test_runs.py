"""Settings and run folders: mistakes are named, and no run is overwritten or mixed with another."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from alphaadam_dist.training.runs import open_run
from alphaadam_dist.training.settings import Settings

SETTINGS = Settings(
    model="tiny-llama",
    data="stdlib",
    zero=2,
    fsdp=False,
    offload=False,
    steps=10,
    gpus=2,
    lr=1e-3,
    batch=8,
    block=64,
    seed=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero": 4}, "--zero is 4: .* 0, 1, 2 and 3"),
        ({"zero": 1, "offload": True}, "--offload with ZeRO-1: .* --zero 2 or --zero 3"),
        ({"fsdp": True}, "--fsdp with --zero 2: .* one of them"),
        ({"zero": None, "fsdp": True, "offload": True}, "--offload with FSDP2: .* --zero 2 or --zero 3"),
        ({"steps": 0}, "--steps is 0: it must be 1 or more"),
        ({"gpus": -1}, "--gpus is -1: it must be 1 or more"),
        ({"batch": 0}, "--batch is 0: it must be 1 or more"),
        ({"block": 1}, "--block is 1: .* 2 tokens or more"),
        ({"lr": -1.0}, "--lr is -1.0: it must be above 0"),
        ({"lr": float("nan")}, "--lr is nan: it must be above 0"),
        ({"model": "./nowhere"}, "--model is ./nowhere: there is no such file or folder"),
        ({"data": "nowhere/"}, "--data is nowhere/: there is no such file or folder"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_settings_survive_the_file(tmp_path: Path):
    SETTINGS.save(tmp_path)
    assert asdict(Settings.load(tmp_path)) == asdict(SETTINGS)


def test_runs_are_numbered_and_resume_takes_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for number in range(1, 12):
        with open_run(None, False, SETTINGS) as run:
            assert run == Path(f"runs/train-{number}")
    with open_run(None, True, SETTINGS) as run:
        assert run == Path("runs/train-11")


def test_resume_without_any_run_starts_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with open_run(None, True, SETTINGS) as run:
        assert Settings.load(run) == SETTINGS


def test_a_used_folder_is_refused_without_resume(tmp_path: Path):
    with open_run(tmp_path / "run", False, SETTINGS):
        pass
    with (
        pytest.raises(ValueError, match=r"run is not empty: add --resume .* or choose another --out"),
        open_run(tmp_path / "run", False, SETTINGS),
    ):
        pass


def test_resume_with_other_settings_is_refused(tmp_path: Path):
    with open_run(tmp_path, False, SETTINGS):
        pass
    with (
        pytest.raises(ValueError, match=r"--lr is 0.002, but the run in .* was started with 0.001"),
        open_run(tmp_path, True, replace(SETTINGS, lr=2e-3)),
    ):
        pass
    assert Settings.load(tmp_path) == SETTINGS


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path):
    with (
        open_run(tmp_path, False, SETTINGS),
        pytest.raises(ValueError, match="still running in"),
        open_run(tmp_path, True, SETTINGS),
    ):
        pass


FSDP = replace(SETTINGS, zero=None, fsdp=True)


@pytest.mark.parametrize(("ranks", "share"), [(2, (8, 1)), (1, (8, 2)), (4, (4, 1)), (8, (2, 1)), (16, (1, 1))])
def test_any_number_of_ranks_takes_the_batch_that_the_run_was_started_with(ranks: int, share: tuple[int, int]):
    blocks, times = SETTINGS.share(ranks)
    assert (blocks, times) == share
    assert ranks * blocks * times == SETTINGS.gpus * SETTINGS.batch


def test_no_rank_takes_more_blocks_at_a_time_than_before():
    assert replace(SETTINGS, gpus=3, batch=5).share(1) == (5, 3)
    assert replace(SETTINGS, gpus=3, batch=4).share(2) == (3, 2)


def test_fsdp_resumes_on_another_number_of_ranks_and_remembers_the_first(tmp_path: Path):
    for gpus in (2, 1, 4):
        with open_run(tmp_path, gpus != 2, replace(FSDP, gpus=gpus)):
            pass
    assert Settings.load(tmp_path) == FSDP


@pytest.mark.parametrize(
    ("started", "gpus", "message"),
    [
        (FSDP, 3, "--gpus is 3, but a step of this run takes 16 blocks, .* give a divisor of 16"),
        (SETTINGS, 1, "--gpus is 1, but the run in .* was started with 2, and a ZeRO checkpoint .* give --gpus 2"),
    ],
)
def test_ranks_that_cannot_go_on_are_refused(started: Settings, gpus: int, message: str, tmp_path: Path):
    with open_run(tmp_path, False, started):
        pass
    with pytest.raises(ValueError, match=message), open_run(tmp_path, True, replace(started, gpus=gpus)):
        pass
