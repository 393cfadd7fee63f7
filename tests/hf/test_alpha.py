"""Where alpha is, as docs/deepspeed.md says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alphaadam_dist import AlphaAdam
from tests.hf import trainer
from tests.ranks import Ranks

pytestmark = pytest.mark.slow


def with_accelerate(stage: int | None) -> tuple[float, float]:
    """alpha after three steps, and the optimizer's own."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    with trainer.clean():
        PartialState(cpu=True)
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
        plugin = None if stage is None else DeepSpeedPlugin(hf_ds_config=config)
        accelerator = Accelerator(cpu=plugin is None, deepspeed_plugin=plugin)
        model: Any = torch.nn.Linear(4, 4)
        ours = AlphaAdam(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, ours)
        for step in range(3):
            accelerator.backward(model(torch.arange(8.0).view(2, 4) - 4 * step).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        alpha = optimizer.optimizer.alpha if stage is None else model.basic_optimizer.alpha
    return alpha, ours.alpha


@pytest.mark.parametrize("stage", [None, 0, 2, 3])
def test_under_accelerate(ranks2: Ranks, stage: int | None) -> None:
    for alpha, ours in ranks2.run(with_accelerate, stage):
        assert alpha == ours > 1
