"""Ranks whose launcher was killed end, under every launcher; and what no launcher started is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alphaadam_dist.training import checkpoints, metrics, tie
from alphaadam_dist.training.start_ranks import free_port

ROOT = Path(__file__).parents[2]
SECONDS = 240.0  # for a launcher to start its ranks on a busy machine
PATIENCE = 40.0  # for ranks to end: longer than they are given to save

TIE = str(Path(tie.__file__))  # loaded alone, so that a rank starts at once
RANK = f"""
import os, pathlib, sys, threading
from importlib.machinery import SourceFileLoader
tie = SourceFileLoader("tie", {TIE!r}).load_module().tie
asked = threading.Event()
tie(asked)
pathlib.Path(sys.argv[1], os.environ.get("RANK", "alone")).write_text(str(os.getpid()))
sys.exit(0 if asked.wait(300) else 9)
"""
SRUN = """#!/usr/bin/env bash
# What srun does for one node of two tasks.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task "$@" & done
wait -n && wait -n
"""
LAUNCHERS: dict[str, dict[str, str]] = {
    "torchrun.sh": {"GPUS": "2"},
    "deepspeed.sh": {"GPUS": "2"},
    "mpirun.sh": {"RANKS": "2", "MPI_ARGS": "--oversubscribe --allow-run-as-root"},
    "slurm.sbatch": {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7"},
}


def wait_for(what: Callable[[], object], seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # an orphan that nobody reaps stays in the table


def environment(tmp_path: Path, variables: dict[str, str]) -> dict[str, str]:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho 127.0.0.1\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    own = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}


def pids(folder: Path, count: int) -> list[int]:
    wait_for(lambda: len([p for p in folder.iterdir() if p.read_text()]) == count, SECONDS, "the ranks did not start")
    return [int(path.read_text()) for path in folder.iterdir()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path, launcher: str) -> None:
    script, ranks = tmp_path / "rank.py", tmp_path / "ranks"
    script.write_text(RANK)
    ranks.mkdir()
    line = [f"launch/{launcher}", str(script), str(ranks)]
    with subprocess.Popen(line, cwd=ROOT, env=environment(tmp_path, LAUNCHERS[launcher])) as started:
        running = pids(ranks, 2)
        assert all(map(runs, running))
        started.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(runs, running)), PATIENCE, "ranks are still running")


def test_what_a_shell_started_outlives_it(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    folder = tmp_path / "ranks"
    folder.mkdir()
    shell = f"{sys.executable} {tmp_path / 'rank.py'} {folder} & wait"
    clean = {name: value for name, value in os.environ.items() if name != "RANK"}
    with subprocess.Popen(["bash", "-c", shell], env={**clean, "PYTHONPATH": str(ROOT)}) as started:
        (alone,) = pids(folder, 1)
        started.send_signal(signal.SIGKILL)
    time.sleep(2)
    assert runs(alone)
    os.kill(alone, signal.SIGKILL)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_recipe_saves_and_stops_when_its_launcher_is_killed(tmp_path: Path) -> None:
    """It would train for hours."""
    shape = ["--layers", "1", "--hidden", "16", "--heads", "1", "--block", "32", "--vocabulary", "300"]
    endless = ["--steps", "1000000", "--save-every", "1000000", "--batch", "1", "--fsdp", "--lr", "1e-3"]
    data = ["--data", str(ROOT / "alphaadam_dist" / "verify"), "--out", str(tmp_path / "run")]
    own = {"GPUS": "2", "ALPHAADAM_CACHE": str(tmp_path / "cache")}
    line = ["launch/torchrun.sh", "launch/pretrain_gpt2.py", *shape, *endless, *data]
    folder = tmp_path / "run" / "alphaadam"

    def steps() -> int:
        return max((entry["step"] for entry in metrics.read(folder / metrics.FILE_NAME)), default=0)

    with subprocess.Popen(line, cwd=ROOT, env=environment(tmp_path, own), stdout=subprocess.DEVNULL) as started:
        wait_for(lambda: steps() > 1, SECONDS, "it did not train")
        started.send_signal(signal.SIGKILL)
    wait_for(lambda: checkpoints.last_complete(folder) is not None, PATIENCE, "it did not save")
    assert checkpoints.step_of(checkpoints.last_complete(folder)) == steps()
    time.sleep(5)
    assert len(list(folder.glob("checkpoint-*"))) == 1
    assert checkpoints.step_of(checkpoints.last_complete(folder)) == steps()
