"""Whatever happens to the main job on the way, its curve is that of a run to which nothing happened."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from alphaadam_dist.training import checkpoints, metrics

ROOT = Path(__file__).parents[2]
STEPS = 10


@pytest.fixture
def text(tmp_path: Path) -> Path:
    source = Path(os.__file__).parent
    for package in ("json", "logging", "collections", "concurrent", "html", "urllib"):
        shutil.copytree(source / package, tmp_path / "text" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "text"


class Job:
    """`alphaadam train` in one folder, started again and again."""

    def __init__(self, out: Path, text: Path, *more: str) -> None:
        self.folder = out / "alphaadam"
        small = ["--steps", str(STEPS), "--batch", "4", "--block", "32", "--data", str(text)]
        self.cache = out.parent / "cache"
        self.arguments = ["train", *small, "--out", str(out), *more]

    def start(self, *more: str, fault: str | None = None) -> subprocess.Popen:
        alphaadam = [str(Path(sys.executable).parent / "alphaadam")]
        command = alphaadam if fault is None else [sys.executable, "-m", "tests.faults.faulty_job"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ALPHAADAM_CACHE": str(self.cache)}
        if fault is not None:
            environment["FAULT"] = fault
        return subprocess.Popen(
            [*command, *self.arguments, *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip

    def finish(self, *more: str, fault: str | None = None) -> tuple[int, str]:
        with self.start(*more, fault=fault) as process:
            output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def stop_after(self, step: int, *more: str, fault: str | None = None) -> str:
        """What it printed when SIGTERM came after this step, and it had saved what it had."""
        with self.start(*more, fault=fault) as process:
            deadline = time.monotonic() + 600
            while max((entry["step"] for entry in metrics.read(self.folder / metrics.FILE_NAME)), default=0) < step:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, f"step {step} did not come"
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=600)
        assert process.returncode == 143, output
        assert "Stopped by SIGTERM: saved. The same command with --resume goes on" in output
        saved = checkpoints.step_of(checkpoints.last_complete(self.folder))
        assert step <= saved < STEPS
        assert self.curve()[-1][0] == saved
        return output

    def curve(self) -> list[tuple[int, float, float]]:
        entries = [entry for entry in metrics.read(self.folder / metrics.FILE_NAME) if "loss" in entry]
        return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries]

    def log(self) -> str:
        return (self.folder / "train.log").read_text()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_fsdp_survives_a_killed_rank_sigterm_and_other_numbers_of_ranks(text: Path, tmp_path: Path):
    calm = Job(tmp_path / "calm", text, "--fsdp", "--no-compare")
    code, output = calm.finish("--gpus", "2")
    assert code == 0, output
    assert [step for step, *_ in calm.curve()] == list(range(1, STEPS + 1))

    job = Job(tmp_path / "run", text, "--fsdp", "--no-compare")
    # rank 1 dies while the checkpoint of step 4 is written; torchrun starts the ranks again, from step 2
    job.stop_after(5, "--gpus", "2", fault=f"save:1:4:{tmp_path}")
    assert (tmp_path / "save-happened").exists()
    assert "exitcode: -9) local_rank: 1" in job.log()
    assert job.curve() == calm.curve()[: len(job.curve())]

    before = len(job.curve())
    assert f"goes on from step {before}." in job.stop_after(7, "--resume", "--gpus", "1")
    code, output = job.finish("--resume", "--gpus", "2")
    assert code == 0, output
    assert job.curve()[:before] == calm.curve()[:before]
    for (step, loss, norm), (calm_step, calm_loss, calm_norm) in zip(job.curve(), calm.curve(), strict=True):
        assert step == calm_step
        # sums in another order, and signs of gradients that are rounding noise
        assert loss == pytest.approx(calm_loss, rel=1e-4)
        assert norm == pytest.approx(calm_norm, rel=1e-3)


def shardings(every: str) -> list[Any]:
    """Both for ``parametrize``: one in every run, the other nightly."""
    both = (["--fsdp"], ["--zero", "2"])
    return [pytest.param(one, marks=() if one[0] == every else pytest.mark.nightly) for one in both]


def last_line(output: str) -> str:
    assert "Traceback" not in output
    return output.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sharding", shardings("--fsdp"), ids=" ".join)
def test_a_mistake_in_the_settings_is_said_once_and_last(text: Path, tmp_path: Path, sharding: list[str]):
    """Neither the launcher nor the other optimizer tries it again."""
    job = Job(tmp_path / "run", text, *sharding, "--gpus", "2", "--block", "9999999")
    code, output = job.finish()
    assert code == 1
    reason = "--data has no training block of 9999999 tokens: give more text, or a smaller --block"
    assert last_line(output) == f"Error: training in {job.folder} failed, {job.folder}/train.log tells how: {reason}"
    assert 1 <= job.log().count("alphaadam failed: ") <= 2, "once a rank"
    assert not (tmp_path / "run" / "adamw").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sharding", shardings("--zero"), ids=" ".join)
def test_a_full_disk_is_named_last_with_the_file(text: Path, tmp_path: Path, sharding: list[str]):
    """A real one of 24 MB, on which the second checkpoint finds no room, and the log neither."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        job = Job(disk / "run", text, *sharding, "--gpus", "2", "--no-compare")
        job.cache = tmp_path / "cache"
        code, output = job.finish()
        assert code == 1
        half = job.folder / "checkpoint-4"
        said = (
            rf"{half} could not be written: {half}/\S+: no space left on device: make room there\. Earlier checkpoints"
        )
        assert re.search(said, last_line(output)), output
        assert checkpoints.step_of(checkpoints.last_complete(job.folder)) == 2
    finally:
        subprocess.run(["umount", disk], check=True)
