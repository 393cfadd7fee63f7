"""The log of a run: readable after a kill at any byte, and without doubles after a resume."""

from pathlib import Path

import pytest

from alphaadam_dist.training import metrics


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 501):
        metrics.append(path, {"step": step, "loss": 1 / step})
    return path


def test_read_gives_what_was_appended(log: Path):
    assert [entry["step"] for entry in metrics.read(log)] == list(range(1, 501))
    assert metrics.read(log)[3] == {"step": 4, "loss": 0.25}


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_cut_short_by_a_kill_is_left_out(log: Path, cut: int):
    log.write_bytes(log.read_bytes()[:-cut])
    assert metrics.read(log)[-1]["step"] == 499
    assert metrics.read_last(log)[-1]["step"] == 499


def test_truncate_drops_what_came_after_the_step(log: Path):
    log.write_bytes(log.read_bytes()[:-4])
    metrics.truncate(log, 100)
    metrics.append(log, {"step": 101, "loss": 0.0})
    assert [entry["step"] for entry in metrics.read(log)] == list(range(1, 102))


def test_truncate_starts_an_empty_log(tmp_path: Path):
    metrics.truncate(tmp_path / "metrics.jsonl", 0)
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_read_last_reads_only_the_end(log: Path):
    last = metrics.read_last(log)
    assert last == metrics.read(log)[-len(last) :]
    assert 10 < len(last) < 300


def test_there_is_no_log_before_the_first_entry(tmp_path: Path):
    assert metrics.read(tmp_path / "none") == metrics.read_last(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"5", b'{"loss": 1}', b'{"step": "3"}', b"\xff", b"\0\0\0", b"[" * 3000]
)
def test_a_line_that_is_no_entry_is_named_and_the_log_stays(log: Path, line: bytes):
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([*lines[:-1], line, lines[-1], b""]))
    before = log.read_bytes()
    for read in (metrics.read, metrics.read_last, lambda path: metrics.truncate(path, 1)):
        with pytest.raises(ValueError, match=f"{log} has a line that is no log entry, .*: remove the line"):
            read(log)
    assert log.read_bytes() == before


def test_a_full_disk_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'metrics.jsonl'}'"):
        metrics.append(tmp_path / "metrics.jsonl", {"step": 1})
