"""What `alphaadam run` starts in tests: a script that has no line about AlphaAdam but its name in a DeepSpeed config.

Run as `unaware.py FOLDER`: each rank takes the steps of two_nodes.py and writes FOLDER/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

torch.manual_seed(0)
model = torch.nn.Linear(5, 7)
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "alphaadam", "params": {"lr": 1e-2}},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
generator = torch.Generator().manual_seed(0)
for _ in range(3):
    engine.backward(engine(torch.randn(4, 5, generator=generator)).square().sum())
    engine.step()
said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "ALPHAADAM_OPTIM")}
said["alpha"] = engine.basic_optimizer.alpha
(Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(said))
dist.barrier()
dist.destroy_process_group()
