"""`alphaadam run` in front of each launcher, on two nodes where one machine can play two: what it needs reaches all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from alphaadam_dist.training.start_ranks import free_port
from tests.recipes import two_nodes
from tests.recipes.test_launchers import TIMEOUT, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT)]

RUN = ["alphaadam", "run", "--"]
SCRIPT = str(Path(two_nodes.__file__).with_name("unaware.py"))
ASKED = {"ALPHAADAM_OPTIM": "alphaadam"}  # no Trainer here reads it: it stands for all that must reach every node


def check(folder: Path) -> None:
    """Both ranks knew AlphaAdam, had our variables, and took the steps of one process."""
    alpha = two_nodes.with_torch(two_nodes.linear())
    for rank in range(2):
        said = json.loads((folder / f"{rank}.json").read_text())
        assert said == {"RANK": str(rank), "WORLD_SIZE": "2", **ASKED, "alpha": alpha}
    assert len(list(folder.glob("*.json"))) == 2


def bare(folder: Path, name: str, body: str) -> str:
    """A folder with a launcher of this name, in whose body $BARE starts a command as on another node: without this
    one's environment."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / name).write_text(
        '#!/usr/bin/env bash\nBARE=(env -i HOME="$HOME" PATH="$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1)\n' + body
    )
    (tools / name).chmod(0o755)
    return str(tools)


def with_tools(tools: str) -> dict[str, str]:
    return {"PATH": f"{tools}:{os.environ['PATH']}"}


def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    node = [*RUN, "launch/torchrun.sh", SCRIPT, str(tmp_path)]
    variables = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GPUS": "1", **ASKED}
    start((node, variables), (node, variables))
    check(tmp_path)


PDSH = """
while [[ $1 == -* ]]; do case $1 in -w) hosts=${2//,/ }; shift 2;; -f) shift 2;; *) shift;; esac; done
command="$*" node=0
for host in $hosts; do "${BARE[@]}" bash -c "${command//%n/$node}" & node=$((node + 1)); done
wait -n && wait -n
"""


@pytest.mark.nightly
def test_deepspeed_hands_it_on_to_other_nodes(tmp_path: Path) -> None:
    """The launcher's own list of variables gets ours; other nodes see nothing that it does not export."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    line = [*RUN, "deepspeed", "--hostfile", str(hostfile), "--no_ssh_check", "--master_addr", "127.0.0.1",
            "--master_port", str(free_port()), "--no_local_rank", SCRIPT, str(tmp_path)]  # fmt: skip
    start((line, {**ASKED, **with_tools(bare(tmp_path, "pdsh", PDSH))}))
    check(tmp_path)


def test_accelerate_launch(tmp_path: Path) -> None:
    line = [*RUN, "accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), SCRIPT,
            str(tmp_path)]  # fmt: skip
    start((line, ASKED))
    check(tmp_path)


@pytest.mark.nightly
def test_mpirun(tmp_path: Path) -> None:
    variables = {
        "RANKS": "2",
        "MPI_ARGS": "--oversubscribe --allow-run-as-root",
        "MASTER_PORT": str(free_port()),
        **ASKED,
    }
    start(([*RUN, "launch/mpirun.sh", SCRIPT, str(tmp_path)], variables))
    check(tmp_path)


HANDS_ON = """
export RANK=0 WORLD_SIZE=2 LOCAL_RANK=0
for word in "$@"; do [[ $word == --export=* ]] && names=${word#--export=}; done
while [[ $1 == --* ]]; do shift; done
for name in ${names//,/ } MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_RANK; do BARE+=("$name=${!name}"); done
for task in 0 1; do "${BARE[@]}" RANK=$task "$@" & done
wait -n && wait -n
"""


@pytest.mark.nightly
def test_srun_that_hands_on_nothing_hands_on_this(tmp_path: Path) -> None:
    tools = bare(tmp_path, "srun", HANDS_ON)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **ASKED, **with_tools(tools)}
    start(([*RUN, "srun", "--export=NONE", "python", SCRIPT, str(tmp_path)], variables))
    check(tmp_path)
