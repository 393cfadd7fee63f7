"""Meets the other ranks, whatever launcher started them."""

import datetime
import os
import subprocess
from collections.abc import Mapping

import torch
import torch.distributed as dist

LAUNCHERS: dict[str, tuple[str, str, str]] = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpirun (MPICH, Intel MPI)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
"""Where launchers tell rank, world size and rank on the node. What runs under sbatch without srun has SLURM_PROCID and
SLURM_NTASKS too, though it is alone; only steps have SLURM_STEP_NUM_TASKS."""

TIMEOUT = datetime.timedelta(minutes=3)  # a rank that waits for one that failed ends too


def join() -> torch.device:
    """Initialise torch.distributed from the launcher's environment; without a launcher this process is the world.

    Returns the device of this rank: its accelerator where there is one, else the CPU.

    Raises:
        ValueError: the launcher does not say where the ranks meet.
    """
    told = environment(os.environ)
    os.environ.update(told)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device("cpu")
    if accelerator is not None:
        device = torch.device(accelerator.type, int(told["LOCAL_RANK"]) % torch.accelerator.device_count())
        torch.accelerator.set_device_index(device)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if accelerator is None else None, timeout=TIMEOUT)
    return device


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, from the variables of any launcher."""
    for launcher, (rank, world, local) in LAUNCHERS.items():  # noqa: B007  (used after the loop)
        if rank in given and world in given:
            told = {"RANK": given[rank], "WORLD_SIZE": given[world], "LOCAL_RANK": given.get(local, "0")}
            break
    else:
        launcher, told = "none", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if "MASTER_ADDR" in given:
        told["MASTER_ADDR"] = given["MASTER_ADDR"]
    elif launcher == "srun":
        told["MASTER_ADDR"] = _first_host(given)
    elif told["WORLD_SIZE"] == given.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"):
        told["MASTER_ADDR"] = "127.0.0.1"
    else:
        raise ValueError(
            f"{launcher} started {told['WORLD_SIZE']} ranks and did not say where they meet: set MASTER_ADDR to the "
            "address of rank 0's machine for all ranks (mpirun -x MASTER_ADDR=..., or -genv MASTER_ADDR ...)"
        )
    job = int(given.get("SLURM_JOB_ID", "0"))
    told["MASTER_PORT"] = given.get("MASTER_PORT", str(29500 + job % 10000))
    return told


def _first_host(given: Mapping[str, str]) -> str:
    hosts = given.get("SLURM_STEP_NODELIST") or given["SLURM_JOB_NODELIST"]
    if "[" not in hosts:
        return hosts.split(",")[0]
    listed = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]
