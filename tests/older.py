"""What tests ask of torch and DeepSpeed that older ones have not, or have otherwise."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from alphaadam_dist.torch_versions import numbers

TORCH = numbers(torch.__version__)
# since 2.7 ranks that all have the whole tensor need not send it
_NOT_SENT = {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}

LACKS = {
    "FSDP+TP sharding does not support uneven sharding": "shards nothing of uneven size by FSDP2 and TP together",
    "'Stream' object has no attribute 'record_event'": "runs no forward under FSDP2 on a CPU",
    "addcdiv_(): argument 'value' must be Number, not Tensor": "takes no tensor for AdamW's rate",
    "assert self.mask_buffer.data is not None": "shares an embedding's mask between ranks on threads, under TP",
    "Moving buffers across devices is supported only for ZeRO stage 3": "with DeepSpeed 0.15 moves no states of ZeRO-2",
    "Offloading is supported only for DeepSpeed FusedAdam": "with DeepSpeed 0.15 moves no parameters alone",
    "at stage 0: DeepSpeed has made its partitions": "with DeepSpeed 0.15 has the wrapper of stage 1 at 0",
    "cannot import name 'ShardPlacementResult'": "shards all of a module over one mesh",
    "'BF16_Optimizer' object has no attribute 'fp16_groups'": "with DeepSpeed 0.15 has the wrapper of stage 1 at 0",
    "attempting to reduce an unsupported grad type: torch.float16": "with DeepSpeed 0.15 reduces no fp16 on a CPU at 0",
}
"""What the oldest corner itself cannot do, by what it says. The tests that ask for it are skipped there."""


def before_2_7(reason: str) -> pytest.MarkDecorator:
    """Skip a test on torch 2.6, with what is otherwise there."""
    return pytest.mark.skipif(TORCH < (2, 7), reason=f"torch 2.6 {reason}")


def _version(package: str) -> tuple[int, ...]:
    try:
        return numbers(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:  # the tests of GPUs need none
        return ()


DEEPSPEED = _version("deepspeed")


def since_deepspeed(version: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test on an older DeepSpeed, with what is otherwise there."""
    return pytest.mark.skipif(numbers(version) > DEEPSPEED, reason=f"this DeepSpeed {reason}")


# Transformers 4.48 divides the loss by the steps of accumulation, and DeepSpeed does so again under it
HF_ACCUMULATES = _version("transformers") >= (4, 50)

deepspeed_has_bf16_masters = since_deepspeed("0.18.3", "has fp32 masters only")


def load_what_deepspeed_saved() -> None:
    """Make torch.load unpickle DeepSpeed's objects where DeepSpeed, before 0.16, does not ask it to. For all ranks."""
    if () < DEEPSPEED < (0, 16):
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


def needs_universal_checkpoints(stage: int) -> None:
    """Skip the rest of a test, which needs universal checkpoints of this stage."""
    if stage == 3 and DEEPSPEED < (0, 18):
        pytest.skip("this DeepSpeed has none of more than one flat")


def lacks(error: BaseException) -> str | None:
    """Why a test cannot run in the oldest corner; None where the error is no fault of torch or DeepSpeed."""
    found = [reason for said, reason in LACKS.items() if said in str(error)]
    return f"torch 2.6 {found[0]}" if found and TORCH < (2, 7) else None


gradients_of_another_dtype = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="this torch gives every gradient its parameter's dtype"
)


def distributed(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of a tensor that every rank has whole."""
    return distribute_tensor(whole, mesh, placements, **_NOT_SENT)
