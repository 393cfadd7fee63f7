"""`launch/`: each launcher starts ranks that meet and agree, on two nodes where one machine can play two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alphaadam_dist.training.start_ranks import free_port
from tests.recipes import two_nodes

TIMEOUT = 600.0  # DeepSpeed may compile an operation first
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT)]

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(two_nodes.__file__))


def start(*lines: tuple[list[str], dict[str, str]]) -> None:
    """Run the command lines side by side, as on several nodes; fail with their output if one fails."""
    clean = {k: v for k, v in os.environ.items() if k not in (*two_nodes.VARIABLES, "MASTER_ADDR", "MASTER_PORT")}
    base = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu"}  # fmt: skip
    said: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(line, env={**base, **variables}, cwd=ROOT, **said) for line, variables in lines]
    try:
        outputs = [node.communicate(timeout=TIMEOUT)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # launchers pass it on to their ranks
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(outputs)[-5000:]


def check(folder: Path, local_ranks: list[str]) -> None:
    """Both ranks were there, knew their place, and took the steps of one process."""
    alpha = two_nodes.with_torch(two_nodes.linear())
    for rank, local_rank in enumerate(local_ranks):
        said = json.loads((folder / f"{rank}.json").read_text())
        assert said == {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": local_rank, "alpha": alpha}
    assert len(list(folder.glob("*.json"))) == 2


def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    node = ["launch/torchrun.sh", SCRIPT, str(tmp_path)]
    variables = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GPUS": "1"}
    start((node, variables), (node, variables))
    check(tmp_path, ["0", "0"])


def test_deepspeed_on_one_node(tmp_path: Path) -> None:
    start((["launch/deepspeed.sh", SCRIPT, str(tmp_path), "zero"], {"GPUS": "2", "MASTER_PORT": str(free_port())}))
    check(tmp_path, ["0", "1"])


@pytest.mark.nightly
def test_deepspeed_on_two_nodes_without_ssh(tmp_path: Path) -> None:
    """Two names of this machine are two nodes to DeepSpeed."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# nodes\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    node = ["launch/deepspeed.sh", SCRIPT, str(tmp_path), "zero"]
    variables = {"HOSTFILE": str(hostfile), "MASTER_PORT": str(free_port())}
    start(*((node, {**variables, "NODE_RANK": str(rank)}) for rank in (0, 1)))
    check(tmp_path, ["0", "0"])


@pytest.mark.nightly
def test_mpirun(tmp_path: Path) -> None:
    """With DeepSpeed, which would ask mpi4py for the ranks if the script did not name them."""
    variables = {"RANKS": "2", "MPI_ARGS": "--oversubscribe --allow-run-as-root", "MASTER_PORT": str(free_port())}
    start((["launch/mpirun.sh", SCRIPT, str(tmp_path), "zero"], variables))
    check(tmp_path, ["0", "1"])


def test_mpi4py_tells_the_ranks_who_they_are(tmp_path: Path) -> None:
    """No script of ours, and no variable of torch's: mpirun alone."""
    line = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, SCRIPT, str(tmp_path)]
    start(([*line, "zero", "mpi"], {"MASTER_PORT": str(free_port())}))
    check(tmp_path, ["0", "1"])


def test_deepspeeds_own_way_through_mpi(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    line = ["deepspeed", "--hostfile", str(hostfile), "--launcher", "openmpi", "--force_multi", "--no_ssh_check",
            "--master_addr", "127.0.0.1", SCRIPT, str(tmp_path), "zero", "mpi"]  # fmt: skip
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    start((line, {"MASTER_PORT": str(free_port()), **as_root}))
    check(tmp_path, ["0", "1"])


SRUN = """#!/usr/bin/env bash
# What srun does for two nodes of one task each.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=0 "$@" & done
wait -n && wait -n
"""


def test_slurm_on_two_nodes(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\nprintf '127.0.0.1\\nlocalhost\\n'\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7"}
    start((["launch/slurm.sbatch", SCRIPT, str(tmp_path)], variables))
    check(tmp_path, ["0", "0"])


@pytest.mark.parametrize(
    ("launcher", "variables", "message"),
    [
        ("torchrun.sh", {}, "give the script to start"),
        ("torchrun.sh", {"NNODES": "2"}, "set MASTER_ADDR"),
        ("deepspeed.sh", {}, "give the script to start"),
        ("mpirun.sh", {}, "give the script to start"),
        ("mpirun.sh", {"RANKS": ""}, "set RANKS"),
        ("slurm.sbatch", {}, "give the script to start"),
    ],
)
def test_what_is_missing_is_named(launcher: str, variables: dict[str, str], message: str) -> None:
    line = [f"launch/{launcher}", *([SCRIPT] if variables else [])]
    done = subprocess.run(line, env={"PATH": os.environ["PATH"], **variables}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert message in done.stderr
