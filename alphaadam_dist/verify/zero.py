"""The Llama under DeepSpeed's ZeRO, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .model import Llama

STAGES = (0, 1, 2, 3)


def installed() -> bool:
    return find_spec("deepspeed") is not None


def engine(model: Llama, optimizer: torch.optim.Optimizer, stage: int, batch: int) -> Any:
    """deepspeed.initialize without a launcher's help and without its log."""
    import deepspeed
    from deepspeed.utils.logging import logger

    logger.setLevel("ERROR")
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,  # stage 3's own linear layer sums in another order
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW, beside which AlphaAdam is measured
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def full_parameters(started: Any) -> Iterator[tuple[str, Tensor]]:
    """The whole parameters by name, copied to the CPU. Collective."""
    import deepspeed

    named = list(started.module.named_parameters())
    with deepspeed.zero.GatheredParameters(
        [param for _, param in named], enabled=started.zero_optimization_stage() == 3
    ):
        yield from [(name, param.detach().cpu().float().clone()) for name, param in named]
