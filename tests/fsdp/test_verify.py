"""``alphaadam verify``: under launchers, and that it fails where the step is not that of one process."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alphaadam_dist import kernels, rule, statistics, step
from alphaadam_dist.kernels import cpu
from alphaadam_dist.verify import rendezvous, run, zero
from alphaadam_dist.verify.settings import Setting
from alphaadam_dist.zero import internals

from .. import threads
from ..older import before_2_7, since_deepspeed
from ..ranks import Ranks

CPU = torch.device("cpu")
ALPHAADAM = str(Path(sys.executable).parent / "alphaadam")


TRIED = {
    ("DDP", "FSDP1", "FSDP1 flat", "FSDP2", "TP"): ("exact", "delayed", "layer", "clip"),
    ("FSDP2",): ("threshold", "look-ahead", "reference", "AlphaLion", "AlphaSGD"),
    ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"): ("exact", "delayed", "layer"),
    ("ZeRO-2 bf16", "ZeRO-3 bf16"): ("exact", "threshold"),
    ("ZeRO-2 offload", "ZeRO-3 offload"): ("delayed", "threshold"),
    ("EP 2 x FSDP2", "pipeline 2 x 2", "Ulysses", "PipelineModule", "AutoEP"): ("exact", "delayed"),
    ("AutoTP",): ("exact", "layer"),
}
PARALLEL = ("EP 2 x FSDP2", "pipeline 2 x 2", "Ulysses", "PipelineModule", "AutoTP", "AutoEP")


def torchrun(ranks: int) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--no-python", ALPHAADAM, "verify"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.slow
def test_under_torchrun() -> None:
    done = torchrun(2)
    assert done.returncode == 0, done.stdout + done.stderr
    for names, settings in TRIED.items():
        for name, setting in itertools.product(names, settings):
            lines = [line for line in done.stdout.splitlines() if re.match(rf"{name} +{setting} ", line)]
            assert len(lines) == 1, (name, setting, done.stdout)
            assert lines[0].split()[-1] == "same"
    assert "FAILED" not in done.stdout
    assert "Not tried here: HSDP, 2 replicas (not on 2 ranks), TP 2 x FSDP2 (not on 2 ranks)" in done.stdout
    assert "context parallel (torch has no causal ring attention on a CPU)" in done.stdout


@pytest.mark.nightly
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
    patch.setattr(statistics.Statistics, "_all_reduce", lambda *args, **kwargs: None)


def everything_counts_twice(patch: pytest.MonkeyPatch) -> None:
    """Equal on all ranks and even the right alpha: only one process knows better."""
    reduce = statistics.Statistics._all_reduce

    def twice(self: Any, tensor: torch.Tensor, **options: Any) -> Any:
        if self.layout.group is not None:
            tensor.mul_(2.0)
        return reduce(self, tensor, **options)

    patch.setattr(statistics.Statistics, "_all_reduce", twice)


def a_collective_more(patch: pytest.MonkeyPatch) -> None:
    update = step.Step.update

    def with_barrier(self: Any, *args: Any, **kwargs: Any) -> None:
        dist.all_reduce(torch.zeros(1))
        update(self, *args, **kwargs)

    patch.setattr(step.Step, "update", with_barrier)


def too_large_a_step(patch: pytest.MonkeyPatch) -> None:
    strengths = statistics.Statistics.strengths
    patch.setattr(statistics.Statistics, "strengths", lambda self, segments: 1.02 * strengths(self, segments))


def rows(names: tuple[str, ...], settings: tuple[str, ...], fault: str = "") -> list[run.Row]:
    """The rows of some shardings and settings, with a fault in the shardings but not in the one process."""
    found = run.starts(CPU)
    chosen = {}
    for name in names:
        wanted = [setting for setting in found[name].settings if setting.name in settings]
        chosen[name] = replace(found[name], settings=wanted, train=partial(_broken, fault, found[name].train))
    return list(run.rows(CPU, chosen))


def _broken(fault: str, train: Any, setting: Setting, fast: bool) -> run.Trained:
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            globals()[fault](patch)
        return train(setting, fast)


def small_rows(*args: Any) -> list[run.Row]:
    """``rows`` of a small model, for ranks that are processes."""
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        return rows(*args)


def small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run, "WIDTH", run.SMALL_WIDTH)


def failed(found: list[run.Row]) -> dict[tuple[str, str], str]:
    return {(row.sharding, row.setting): "; ".join(row.problems) for row in found if row.problems}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("no_all_reduce", "alpha on rank 1 not those of rank 0"),
        ("everything_counts_twice", "step 1 counted"),
        ("a_collective_more", "2 collectives a step more than AdamW's"),
        ("too_large_a_step", "parameters deviate"),
    ],
)
def test_what_is_broken_fails(ranks2: Ranks, fault: str, problem: str) -> None:
    answers = ranks2.run(small_rows, ("FSDP2", "ZeRO-2"), ("exact", "delayed"), fault)
    assert answers[0] == answers[1], "all ranks exit alike"
    assert len(answers[0]) == 4
    for row in answers[0]:
        assert any(problem in text for text in row.problems), row


@pytest.mark.slow
def test_four_ranks(ranks4: Ranks) -> None:
    settings = ("exact", "delayed", "layer", "clip")
    found = ranks4.run(small_rows, ("HSDP, 2 replicas", "TP 2 x FSDP2"), settings)[0]
    assert len(found) == 8
    for row in found:
        assert row.problems == []
        assert row.collectives == 1
        assert row.bytes == (16 * 21 if row.setting == "layer" else 24 if row.setting == "clip" else 16)
        assert row.deviation < 1e-3


@pytest.mark.slow
@since_deepspeed("0.19.8", "has not all of these")
def test_pairs_of_four_ranks(ranks4: Ranks) -> None:
    found = ranks4.run(small_rows, PARALLEL, ("exact", "delayed", "layer"))[0]
    assert len(found) == 12
    for row in found:
        assert row.problems == []
        assert row.collectives == 1
        assert row.deviation < 1e-3
        if row.sharding != "EP 2 x FSDP2":  # there a token's sum is of two experts, in any order the same
            assert row.deviation > 0, "a run equal to one process by accident shows nothing"


@pytest.mark.slow
@since_deepspeed("0.19.8", "has not all of these")
def test_ranks_that_count_alone_fail(ranks2: Ranks) -> None:
    found = ranks2.run(small_rows, PARALLEL, ("exact",), "no_all_reduce")[0]
    assert {row.sharding for row in found if row.problems} == set(PARALLEL)


# ---- kernels


def update_goes_too_far(patch: pytest.MonkeyPatch, of: Any = None) -> None:
    def update(direction: Any, *args: Any, hyperparameters: Any, **rest: Any) -> Any:
        longer = 1.02 if of in (None, direction) else 1.0
        return kept(direction, *args, hyperparameters={**hyperparameters, "lr": longer * hyperparameters["lr"]}, **rest)

    kept = cpu.update
    patch.setattr(cpu, "update", update)


def lion_goes_too_far(patch: pytest.MonkeyPatch) -> None:
    update_goes_too_far(patch, rule.lion_)


def sgd_goes_too_far(patch: pytest.MonkeyPatch) -> None:
    update_goes_too_far(patch, rule.sgd_)


def count_overlooks_a_tensor(patch: pytest.MonkeyPatch) -> None:
    def count(*args: Any, **rest: Any) -> Any:
        counts, norms = kept(*args, **rest)
        counts[1] = 0
        return counts, norms

    kept = cpu.count
    patch.setattr(cpu, "count", count)


def update_overlooks_a_tensor(patch: pytest.MonkeyPatch) -> None:
    def update(*args: Any, **rest: Any) -> Any:
        counts, norms = kept(*args, **rest)
        if counts is not None:
            counts[1] = 0
        return counts, norms

    kept = cpu.update
    patch.setattr(cpu, "update", update)


def count_mixes_tensors_up(patch: pytest.MonkeyPatch) -> None:
    def count(*args: Any, **rest: Any) -> Any:
        counts, norms = kept(*args, **rest)
        return counts.flip(0), norms

    kept = cpu.count
    patch.setattr(cpu, "count", count)


def norms_are_too_large(patch: pytest.MonkeyPatch) -> None:
    def count(*args: Any, **rest: Any) -> Any:
        counts, norms = kept(*args, **rest)
        return counts, None if norms is None else 2 * norms

    kept = cpu.count
    patch.setattr(cpu, "count", count)


def count_knows_no_threshold(patch: pytest.MonkeyPatch) -> None:
    kept = cpu.count
    patch.setattr(cpu, "count", lambda *args, threshold, **rest: kept(*args, threshold=0.0, **rest))


def update_knows_no_threshold(patch: pytest.MonkeyPatch) -> None:
    kept = cpu.update
    patch.setattr(cpu, "update", lambda *args, threshold, **rest: kept(*args, threshold=0.0, **rest))


def clipping_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    """The threshold sees gradients that DeepSpeed has still to clip."""
    patch.setattr(internals, "unscale_factor", lambda wrapper, norm: 1.0)


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@before_2_7("runs no forward under FSDP2 on a CPU, and verify reports that as a failed row")
@pytest.mark.parametrize(
    ("fault", "seen_by", "not_by", "problem"),
    [
        ("update_goes_too_far", "exact", "reference", "parameters deviate"),
        slow("lion_goes_too_far", "AlphaLion", "exact", "parameters deviate"),
        slow("sgd_goes_too_far", "AlphaSGD", "exact", "parameters deviate"),
        ("count_overlooks_a_tensor", "exact", "delayed", "step 1 counted"),
        slow("update_overlooks_a_tensor", "delayed", "exact", "step 1 counted"),
        slow("count_mixes_tensors_up", "layer", "exact", "parameters deviate"),
        slow("norms_are_too_large", "clip", "exact", "parameters deviate"),
        slow("count_knows_no_threshold", "threshold", "exact", "step 2 counted"),
        slow("update_knows_no_threshold", "threshold", "exact", "parameters deviate"),
    ],
)
def test_a_broken_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, fault: str, seen_by: str, not_by: str, problem: str
) -> None:
    small(monkeypatch)
    globals()[fault](monkeypatch)
    found = failed(threads.run(1, rows, ("FSDP2",), (seen_by, not_by))[0])
    assert [setting for _, setting in found] == [seen_by]
    assert found["FSDP2", seen_by].startswith("one process on the fast kernels against the reference: ")
    assert problem in found["FSDP2", seen_by]


@pytest.mark.slow
def test_all_rows_but_one_are_on_fast_kernels(ranks2: Ranks) -> None:
    tried = ranks2.run(_tried)[0]
    settings = tuple({setting for each in tried.values() for setting in each})
    found = ranks2.run(small_rows, tuple(tried), settings, "update_goes_too_far")[0]
    assert {name: [row.setting for row in found if row.sharding == name] for name in tried} == tried
    in_fp32 = [row for row in found if row.sharding.split()[-1] not in ("bf16", "offload")]
    assert [(row.sharding, row.setting) for row in in_fp32 if not row.problems] == [("FSDP2", "reference")]


def _tried() -> dict[str, list[str]]:
    return {name: [setting.name for setting in start.settings] for name, start in run.starts(CPU).items()}


@pytest.mark.slow
def test_a_clipping_that_is_overlooked_under_zero_fails(ranks2: Ranks) -> None:
    names = ("ZeRO-2 bf16", "ZeRO-3 bf16", "ZeRO-2 offload", "ZeRO-3 offload")
    found = failed(ranks2.run(small_rows, names, ("exact", "delayed", "threshold"), "clipping_is_overlooked")[0])
    assert set(found) == {(name, "threshold") for name in names}


@pytest.mark.slow
def test_a_kernel_broken_under_offload_fails(ranks2: Ranks) -> None:
    names = ("ZeRO-2 offload", "ZeRO-3 offload")
    assert not failed(ranks2.run(small_rows, names, ("delayed", "threshold"))[0])
    found = failed(ranks2.run(small_rows, names, ("delayed", "threshold"), "update_overlooks_a_tensor")[0])
    assert set(found) == {(name, "delayed") for name in names}


def test_the_model_is_one_for_fast_kernels() -> None:
    assert sum(param.numel() for param in run.llama(CPU).parameters()) >= kernels.SMALL


@before_2_7("runs no forward under FSDP2 on a CPU, and verify reports that as a failed row")
def test_without_fast_kernels_all_rows_are_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(fused: bool | None, device: torch.device, elements: int) -> Any:
        if fused:
            raise ValueError("fused=True, but there is no C++ compiler 'c++'")
        return kernels.reference

    small(monkeypatch)
    monkeypatch.setattr(kernels, "choose", no_compiler)
    found = threads.run(2, rows, ("FSDP2",), ("exact", "layer", "reference"))[0]
    assert [row.setting for row in found] == ["exact", "layer"], "another 'reference' would be 'exact' again"
    assert not failed(found)
    assert found[0].deviation == 0
    reason = "the fast kernels on cpu (rank 0: fused=True, but there is no C++ compiler 'c++')"
    assert reason in threads.run(2, run.left_out, CPU)[0]


def test_a_deepspeed_that_cannot_be_imported_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(zero, "_deepspeed", broken)
    assert set(threads.run(1, run.starts, CPU)[0]) == {"DDP", "FSDP2"}
    reason = "ZeRO (rank 0: DeepSpeed cannot be imported: ImportError: undefined symbol)"
    assert reason in threads.run(1, run.left_out, CPU)[0]


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
    assert rendezvous.environment(given) == MET


def test_slurm_meets_on_its_first_host() -> None:
    given = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu7,gpu9",
             "SLURM_JOB_ID": "70012"}  # fmt: skip
    assert rendezvous.environment(given) == {**MET, "LOCAL_RANK": "0", "MASTER_ADDR": "gpu7", "MASTER_PORT": "29512"}


def test_sbatch_without_srun_is_one_process() -> None:
    told = rendezvous.environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[7-9]"})
    assert (told["WORLD_SIZE"], told["MASTER_ADDR"]) == ("1", "127.0.0.1")


def test_mpirun_on_one_machine_needs_no_address_and_on_two_it_does() -> None:
    given = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    assert rendezvous.environment(given)["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ValueError, match=r"mpirun \(Open MPI\) started 8 ranks.*set MASTER_ADDR"):
        rendezvous.environment({**given, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
