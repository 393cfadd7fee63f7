"""FSDP2 for a training run, as the Trainer and Accelerate do it; also on the CPU, where Accelerate leaves it out."""

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

ARGUMENTS: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
"""For TrainingArguments. Full state dicts, so that a checkpoint's model loads with from_pretrained."""


def shard_on_cpu(arguments: TrainingArguments) -> None:
    """Make Accelerate shard on the CPU too. Call it after the arguments exist and before the Trainer does.

    Accelerate takes FSDP only where it finds several GPUs, and would replicate the model without a word. The process's
    state is shared by all its objects, so what it finds is what is written here.
    """
    assert arguments.device.type == "cpu"  # reading it makes the state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
