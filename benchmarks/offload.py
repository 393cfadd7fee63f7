"""ZeRO-2 and ZeRO-3 with the optimizer on the CPU: the optimizer's share of a step beside DeepSpeed's own Adam."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turns import Row, Steps, compare, take_turns

OFFLOAD_PEER = "DeepSpeedCPUAdam"
BARS = {"AlphaAdam delayed": 0.85, "AlphaAdam exact": 1.10}


def offloaded(stage: int, rounds: int) -> list[Row]:
    """ZeRO with the optimizer on the CPU, 32 Mi bf16 parameters, clipped: engine.step(), and the optimizer's share."""
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists
    steps: Steps = {}
    backwards: Steps = {}
    shares: dict[str, list[float]] = {}
    for name in (OFFLOAD_PEER, "AlphaAdam delayed", "AlphaAdam exact"):
        options = {"lr": 1e-3, "sync": name.removeprefix("AlphaAdam "), "fused": True}
        adam = {"type": "AdamW", "params": {"lr": 1e-3}}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
            "optimizer": adam if name == OFFLOAD_PEER else {"type": "AlphaAdam", "params": options},
        }
        model = _Sum()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        shares[name] = _timed(engine.optimizer)
        steps[name] = engine.step
        backwards[name] = partial(_backward, engine)
    seconds = take_turns(steps, rounds, torch.device("cpu"), backwards)
    share = {name: times[1:] for name, times in shares.items()}
    rows = []
    for name in shares:
        rows.append(compare(f"ZeRO-{stage} offload, optimizer", name, share, OFFLOAD_PEER, BARS.get(name)))
        rows.append(compare(f"ZeRO-{stage} offload, engine.step()", name, seconds, OFFLOAD_PEER))
    return rows


class _Sum(nn.Module):
    """32 Mi parameters and next to no work beside their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4096, 4096)) for _ in range(2)])

    def forward(self, seed: Tensor) -> Tensor:
        return torch.stack([(weight * seed).sum() for weight in self.weights]).sum()


def _backward(engine: Any) -> None:
    engine.backward(engine(torch.tensor(1.0)))


def _timed(zero: Any) -> list[float]:
    """Seconds that the optimizer itself takes in each step of a ZeRO wrapper, appended as it goes."""
    times: list[float] = []
    step, unscale = zero.optimizer.step, zero.unscale_and_clip_grads
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            result = function(*args, **kwargs)
            inside += time.perf_counter() - start
            return result

        return call

    zero.optimizer.step, zero.unscale_and_clip_grads = timed(step), timed(unscale)
    whole = zero.step

    def whole_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside = 0.0
        result = whole(*args, **kwargs)
        times.append(inside)
        return result

    zero.step = whole_step
    return times
