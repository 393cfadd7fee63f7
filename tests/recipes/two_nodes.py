"""What the launchers start in tests: a model sharded over the ranks takes three steps, and says who it was.

Run as `two_nodes.py FOLDER`: each rank writes FOLDER/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from alphaadam_dist import AlphaAdam

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def steps(model: nn.Module) -> float:
    """alpha after three steps on equal batches."""
    optimizer = AlphaAdam(model.named_parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        model(torch.randn(4, 5, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    alpha = optimizer.alpha
    assert isinstance(alpha, float)
    return alpha


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 7)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    model = linear()
    fully_shard(model)
    said = {name: os.environ[name] for name in VARIABLES}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps({**said, "alpha": steps(model)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
