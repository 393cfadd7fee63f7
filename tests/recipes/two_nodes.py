"""What the launchers start in tests: a model sharded over the ranks takes three steps, and says who it was.

Run as `two_nodes.py FOLDER` or, under DeepSpeed, `two_nodes.py FOLDER zero`: each rank writes FOLDER/RANK.json. With a
third word, `mpi`, it is mpi4py that says who each rank is.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from alphaadam_dist import AlphaAdam
from alphaadam_dist.training.rank import leave

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LR = 1e-2


def steps(model: Any, backward: Callable[[Tensor], Any], step: Callable[[], Any], optimizer: AlphaAdam) -> float:
    """alpha after three steps on equal batches."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        backward(model(torch.randn(4, 5, generator=generator)).square().sum())
        step()
        optimizer.zero_grad()
    alpha = optimizer.alpha
    assert isinstance(alpha, float)
    return alpha


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 7)


def with_torch(model: nn.Module) -> float:
    optimizer = AlphaAdam(model.named_parameters(), lr=LR)
    return steps(model, Tensor.backward, optimizer.step, optimizer)


def with_zero(model: nn.Module) -> float:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AlphaAdam", "params": {"lr": LR}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return steps(engine, engine.backward, engine.step, engine.basic_optimizer)


def main(folder: Path, zero: bool, mpi: bool) -> None:
    model = linear()
    if mpi:
        assert not any(name in os.environ for name in VARIABLES)
        port = int(os.environ["MASTER_PORT"])
        deepspeed.init_distributed("gloo", auto_mpi_discovery=True, distributed_port=port)
    if zero:
        alpha = with_zero(model)
    else:
        dist.init_process_group("gloo")
        fully_shard(model)
        alpha = with_torch(model)
    said = {name: os.environ[name] for name in VARIABLES}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps({**said, "alpha": alpha}))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), zero="zero" in sys.argv[2:], mpi="mpi" in sys.argv[2:])
