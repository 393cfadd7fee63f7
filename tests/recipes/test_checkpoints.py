"""Which checkpoint a run goes on from."""

from pathlib import Path

import pytest

from alphaadam_dist.training import checkpoints
from tests.checkpoint.test_files import largest_file


def test_the_newest_complete_checkpoint_is_taken(tmp_path: Path):
    for step in (20, 100, 80):
        (tmp_path / f"checkpoint-{step}").mkdir()
        checkpoints.mark_complete(tmp_path / f"checkpoint-{step}")
    assert checkpoints.last_complete(tmp_path) == tmp_path / "checkpoint-100"


def test_a_half_written_checkpoint_is_skipped(tmp_path: Path):
    for step in (20, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    checkpoints.mark_complete(tmp_path / "checkpoint-20")
    with pytest.warns(UserWarning, match="checkpoint-40: it was not finished"):
        assert checkpoints.last_complete(tmp_path) == tmp_path / "checkpoint-20"


def test_a_checkpoint_taken_up_is_the_newest_that_the_trainer_sees(tmp_path: Path):
    for step in (20, 33, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("whole")
        checkpoints.mark_complete(tmp_path / f"checkpoint-{step}")
    for step in (33, 40):
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("whale")
    with pytest.warns(UserWarning, match="weights is damaged"):
        assert checkpoints.take_up(tmp_path) == tmp_path / "checkpoint-20"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-20"]
    assert (tmp_path / "set-aside-checkpoint-40" / "weights").exists()


def test_without_checkpoints_a_run_starts_at_step_0(tmp_path: Path):
    assert checkpoints.last_complete(tmp_path) is None
    assert checkpoints.last_complete(tmp_path / "missing") is None
    assert checkpoints.step_of(None) == 0


def test_the_step_is_read_from_the_name(tmp_path: Path):
    assert checkpoints.step_of(tmp_path / "checkpoint-1200") == 1200
    with pytest.raises(ValueError, match="must be checkpoint-STEP"):
        checkpoints.step_of(tmp_path / "checkpoint-last")


# ---- what is not whole, and what is not ours


def whole(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text(f"of step {step}")
    checkpoints.mark_complete(checkpoint)
    return checkpoint


def strange(folder: Path, step: int) -> Path:
    """What a Trainer without the marker leaves."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text(f"somebody's, of step {step}")
    return checkpoint


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


MARKERS = {
    "a list": b"[1, 2]",
    "a number": b"5",
    "null": b"null",
    "text": b'"complete"',
    "no JSON": b"{",
    "empty": b"",
    "no UTF-8": b"\xff\xfe",
    "nested without end": b"[" * 10**5,
    "no file recorded": b"{}",
    "a number for a measure": b'{"weights": 5}',
    "half a measure": b'{"weights": [1]}',
    "text for a measure": b'{"weights": ["9", "1"]}',
    "null for a measure": b'{"weights": [null, null]}',
}


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_of_another_shape_is_not_whole(tmp_path: Path, marker: str):
    good, bad = whole(tmp_path, 20), whole(tmp_path, 40)
    (bad / "complete").write_bytes(MARKERS[marker])
    with pytest.warns(UserWarning, match="skipping .*checkpoint-40: complete is damaged"):
        assert checkpoints.last_complete(tmp_path) == good
    with pytest.warns(UserWarning, match="checkpoint-40 is now set-aside-checkpoint-40"):
        assert checkpoints.take_up(tmp_path) == good


def test_a_folder_in_the_place_of_the_marker_is_not_whole(tmp_path: Path):
    (whole(tmp_path, 40) / "complete").unlink()
    (tmp_path / "checkpoint-40" / "complete").mkdir()
    with pytest.warns(UserWarning, match="complete is damaged or cannot be read"):
        assert checkpoints.last_complete(tmp_path) is None


@pytest.mark.parametrize("ours", [None, 20])
def test_checkpoints_of_another_trainer_are_not_touched(tmp_path: Path, ours: int | None):
    if ours:
        whole(tmp_path, ours)
    for step in (500, 1000):
        strange(tmp_path, step)
    before = tree(tmp_path)
    with (
        pytest.warns(UserWarning, match="it was not finished"),
        pytest.raises(ValueError, match="has checkpoint-1000, checkpoint-500 without") as told,
    ):
        checkpoints.take_up(tmp_path)
    assert f"mark_complete(Path('{tmp_path / 'checkpoint-1000'}'))" in str(told.value)
    assert "move them elsewhere, or choose another folder" in str(told.value)
    assert tree(tmp_path) == before
    checkpoints.mark_complete(tmp_path / "checkpoint-1000")  # as the message says
    assert checkpoints.take_up(tmp_path) == tmp_path / "checkpoint-1000"
    assert {name: held for name, held in tree(tmp_path).items() if name in before} == before


def test_what_this_run_left_half_written_is_renamed_and_never_lost(tmp_path: Path):
    good = whole(tmp_path, 20)
    for n, aside in enumerate(("set-aside-checkpoint-30", "set-aside-checkpoint-30-2", "set-aside-checkpoint-30-3")):
        checkpoints.begin(tmp_path / "checkpoint-30")
        (tmp_path / "checkpoint-30").mkdir()
        (tmp_path / "checkpoint-30" / "weights").write_text(f"half {n}")
        with pytest.warns(UserWarning, match=f"checkpoint-30 is now {aside}: remove it when you do not need it"):
            assert checkpoints.take_up(tmp_path) == good
        assert not (tmp_path / "checkpoint-30").exists()
    kept = [(path / "weights").read_text() for path in sorted(tmp_path.glob("set-aside-*"))]
    assert kept == ["half 0", "half 1", "half 2"]
    assert (good / "weights").read_text() == "of step 20"


def test_a_finished_checkpoint_is_no_longer_a_begun_one(tmp_path: Path):
    checkpoints.begin(tmp_path / "checkpoint-30")
    done = whole(tmp_path, 30)
    (done / "complete").unlink()  # now it is like somebody else's
    with (
        pytest.warns(UserWarning, match="it was not finished"),
        pytest.raises(ValueError, match="checkpoint-30 without"),
    ):
        checkpoints.take_up(tmp_path)
    assert (done / "weights").exists()


def test_a_folder_that_was_there_is_not_taken_for_this_runs_own(tmp_path: Path):
    theirs = strange(tmp_path, 30)
    checkpoints.begin(theirs)
    with (
        pytest.warns(UserWarning, match="it was not finished"),
        pytest.raises(ValueError, match="checkpoint-30 without"),
    ):
        checkpoints.take_up(tmp_path)
    assert (theirs / "weights").exists()


def test_an_error_of_the_training_passes_and_touches_nothing(tmp_path: Path):
    whole(tmp_path, 20)
    strange(tmp_path, 2000)
    before = tree(tmp_path)
    error = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError) as raised, checkpoints.naming_failed_saves(tmp_path):
        raise error
    assert raised.value is error
    checkpoints.begin(tmp_path / "checkpoint-3000")  # asked for, and not written yet
    with pytest.raises(RuntimeError) as raised, checkpoints.naming_failed_saves(tmp_path):
        raise error
    assert raised.value is error
    assert {name: held for name, held in tree(tmp_path).items() if name in before} == before


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device"), "no space left on device: make room there"),
        (OSError(122, "Disk quota exceeded", "x"), "x: disk quota exceeded: make room in your quota there"),
        (PermissionError(13, "Permission denied", "y"), "y: permission denied: change who may read and write there"),
    ],
)
def test_a_save_that_fails_says_what_the_system_refused(tmp_path: Path, error: OSError, why: str):
    checkpoints.begin(tmp_path / "checkpoint-30")
    half = strange(tmp_path, 30)
    by_torch = RuntimeError("unexpected pos 576 vs 534")
    by_torch.__cause__ = error
    with pytest.raises(checkpoints.SaveFailed) as failure, checkpoints.naming_failed_saves(tmp_path):
        raise by_torch
    said = str(failure.value)
    assert said.startswith(f"{half} could not be written: {why}")
    assert "Earlier checkpoints are untouched: --resume goes on from the last" in said
    assert (half / "weights").exists()


def test_a_library_that_keeps_the_systems_reason_to_itself_is_asked_again(tmp_path: Path):
    checkpoints.begin(tmp_path / "checkpoint-30")
    half = strange(tmp_path, 30)
    with (
        largest_file(4),
        pytest.raises(checkpoints.SaveFailed, match=rf"{half}/weights: file too large: allow larger files"),
        checkpoints.naming_failed_saves(tmp_path),
    ):
        raise RuntimeError("unexpected pos 576 vs 534")
