"""Every file of `accelerate_configs/` goes through `accelerate launch`'s own reading, and trains as it says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from alphaadam_dist import AlphaAdam
from alphaadam_dist.paths import config_path
from tests.hf import trainer
from tests.models import tiny_llama, token_batches
from tests.ranks import Ranks

pytestmark = pytest.mark.slow

FOLDER = config_path("accelerate_configs/fsdp2.yaml").parent
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def variables_of(name: str, *more: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the ranks that it starts, by its own functions."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    line = ["--config_file", str(FOLDER / name), "--num_processes", "4", *more, "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert args.use_fsdp, name
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    return {key: value for key, value in prepare_multi_gpu_env(args).items() if key.startswith(prefixes)}


def train(variables: dict[str, str]) -> dict[str, Any]:
    """Two steps of the tiny Llama as a rank that Accelerate started, on the CPU."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType

    with trainer.clean():
        os.environ.update(variables)
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = (
            DistributedType.MULTI_GPU
        )  # see shard_on_cpu in training/trainer.py
        accelerator = Accelerator()
        plugin = accelerator.state.fsdp_plugin
        offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        if offload:
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # memory is pinned for a GPU
        in_bf16 = variables["ACCELERATE_MIXED_PRECISION"] == "no"
        model = tiny_llama().bfloat16() if in_bf16 else tiny_llama()
        state_dtype = "bfloat16" if in_bf16 else None
        optimizer: Any = AlphaAdam(model.named_parameters(), lr=1e-2, state_dtype=state_dtype)
        model, optimizer = accelerator.prepare(model, optimizer)
        for batch in token_batches(2, 4):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        param = model.model.layers[0].mlp.up_proj.weight
        assert isinstance(param, DTensor)
        found = trainer.find(optimizer)
        return {
            "alpha": found.alpha,
            "counted": found.agreement["agree"] + found.agreement["conflict"],
            "shape": tuple(param.to_local().shape),
            "mesh": tuple(param.device_mesh.shape),
            "dtype": param.dtype,
            "compute": getattr(plugin.mixed_precision_policy, "param_dtype", None) or param.dtype,
            "offload": offload,
            "unit": type(model.model.layers[0]).__name__,
        }


@pytest.mark.parametrize("name", FILES)
def test_two_steps(ranks4: Ranks, name: str) -> None:
    hybrid = "hybrid" in name
    more = ["--parallelism_config_dp_shard_size", "2"] if hybrid else []
    seen = ranks4.run(train, variables_of(name, *more))
    numels = sum(param.numel() for param in tiny_llama().parameters())
    for found in seen:
        assert found["alpha"] == seen[0]["alpha"] > 1
        assert 0.5 * numels < found["counted"] <= numels
        assert found["mesh"] == ((2, 2) if hybrid else (4,))
        assert found["shape"] == (56 // (2 if hybrid else 4), 32)
        kept = torch.bfloat16 if "bf16" in name else torch.float32
        assert (found["dtype"], found["compute"]) == (kept, torch.bfloat16)
        assert found["offload"] == ("offload" in name)
        assert found["unit"] == "FSDPLlamaDecoderLayer"


def test_the_hybrid_file_is_for_two_nodes_of_eight() -> None:
    variables = variables_of("fsdp2_hybrid.yaml")
    assert variables["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
    assert variables["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"


def test_the_files_are_listed_where_people_look() -> None:
    text = (Path(__file__).parents[2] / "docs" / "fsdp.md").read_text()
    assert [name for name in FILES if name not in text] == []
