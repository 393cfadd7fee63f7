"""Which checkpoint a run goes on from."""

from pathlib import Path

import pytest

from alphaadam_dist.training import checkpoints


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
