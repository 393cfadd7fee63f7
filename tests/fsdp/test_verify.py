"""``alphaadam verify``: under launchers, and that it fails where the step is not that of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alphaadam_dist import counts, optimizer
from alphaadam_dist.verify import launch, run

from ..ranks import Ranks

CPU = torch.device("cpu")
ALPHAADAM = str(Path(sys.executable).parent / "alphaadam")


def torchrun(ranks: int) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--no-python", ALPHAADAM, "verify"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.slow
def test_under_torchrun() -> None:
    done = torchrun(2)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("DDP", "FSDP1", "FSDP1 flat", "FSDP2", "TP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        for setting in ("exact", "delayed", "layer"):
            lines = [line for line in done.stdout.splitlines() if re.match(rf"{name}  +{setting} ", line)]
            assert len(lines) == 1, (name, setting, done.stdout)
            assert lines[0].split()[-1] == "same"
    assert "FAILED" not in done.stdout
    assert "Not tried: HSDP, 2 replicas (not on 2 ranks), TP 2 x FSDP2 (not on 2 ranks)" in done.stdout


@pytest.mark.slow
def test_without_a_launcher() -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": "29761"}
    done = subprocess.run([ALPHAADAM, "verify"], capture_output=True, text=True,
                          env=environment, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 ranks on cpu" in done.stdout


def no_all_reduce(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(counts.Statistics, "_all_reduce", lambda *args, **kwargs: None)


def everything_counts_twice(patch: pytest.MonkeyPatch) -> None:
    """Equal on all ranks and even the right alpha: only one process knows better."""
    reduce = counts.Statistics._all_reduce

    def twice(self: Any, tensor: torch.Tensor, **options: Any) -> Any:
        if self.layout.group is not None:
            tensor.mul_(2.0)
        return reduce(self, tensor, **options)

    patch.setattr(counts.Statistics, "_all_reduce", twice)


def a_collective_more(patch: pytest.MonkeyPatch) -> None:
    step = optimizer.AlphaOptimizer._update

    def with_barrier(self: Any, held: Any) -> None:
        dist.all_reduce(torch.zeros(1))
        step(self, held)

    patch.setattr(optimizer.AlphaOptimizer, "_update", with_barrier)


def too_large_a_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(counts.Statistics, "strengths", lambda self, slots: torch.full((len(slots), 2), 1.01).double())


def rows(names: tuple[str, ...], fault: str = "") -> list[run.Row]:
    chosen = {name: start for name, start in run.starts(CPU).items() if name in names}
    assert len(chosen) == len(names)
    with pytest.MonkeyPatch.context() as patch:
        if fault == "too_large_a_step":  # one process must stay right
            under = {name: _patched(patch, fault, start) for name, start in chosen.items()}
            return list(run.rows(CPU, under))
        if fault:
            globals()[fault](patch)
        return list(run.rows(CPU, chosen))


def _patched(patch: pytest.MonkeyPatch, fault: str, start: run.Start) -> run.Start:
    def broken(options: Any) -> run.Trained:
        globals()[fault](patch)
        trained = start(options)
        patch.undo()
        return trained

    return broken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("no_all_reduce", "alpha on rank 1 not those of rank 0"),
        ("everything_counts_twice", "step 1 counted"),
        ("a_collective_more", "2 collectives a step"),
        ("too_large_a_step", "parameters deviate"),
    ],
)
def test_what_is_broken_fails(ranks2: Ranks, fault: str, problem: str) -> None:
    answers = ranks2.run(rows, ("FSDP2", "ZeRO-2"), fault)
    assert answers[0] == answers[1], "all ranks exit alike"
    for row in answers[0]:
        assert any(problem in text for text in row.problems), row


@pytest.mark.slow
def test_four_ranks(ranks4: Ranks) -> None:
    for row in ranks4.run(rows, ("HSDP, 2 replicas", "TP 2 x FSDP2"))[0]:
        assert row.problems == []
        assert row.collectives == 1
        assert row.bytes == (16 * 21 if row.setting == "layer" else 32)
        assert row.deviation < 5e-6


# ---- launchers

HOST = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
MET = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **HOST}


@pytest.mark.parametrize(
    "given",
    [
        MET,
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **HOST},
        {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", **HOST},
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", **HOST},
    ],
    ids=["torchrun", "openmpi", "mpich", "slurm"],
)
def test_launchers(given: dict[str, str]) -> None:
    assert launch.environment(given) == MET


def test_slurm_meets_on_its_first_host() -> None:
    given = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu7,gpu9",
             "SLURM_JOB_ID": "70012"}  # fmt: skip
    assert launch.environment(given) == {**MET, "LOCAL_RANK": "0", "MASTER_ADDR": "gpu7", "MASTER_PORT": "29512"}


def test_sbatch_without_srun_is_one_process() -> None:
    told = launch.environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[7-9]"})
    assert (told["WORLD_SIZE"], told["MASTER_ADDR"]) == ("1", "127.0.0.1")


def test_mpirun_on_one_machine_needs_no_address_and_on_two_it_does() -> None:
    given = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    assert launch.environment(given)["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ValueError, match=r"mpirun \(Open MPI\) started 8 ranks.*set MASTER_ADDR"):
        launch.environment({**given, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
