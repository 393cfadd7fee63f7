"""ZeRO-2 and ZeRO-3 with the optimizer on the CPU: the optimizer's share of a step beside DeepSpeed's own Adam."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import alphaadam_dist  # noqa: F401  # so that a config may name AlphaAdam
from benchmarks.turns import Row, Steps, compare, take_turns

OFFLOAD_PEER = "DeepSpeedCPUAdam"
CONTESTANTS = (OFFLOAD_PEER, "AlphaAdam delayed", "AlphaAdam exact")
PROCESSES = 3
BARS = {"AlphaAdam delayed": 0.85, "AlphaAdam exact": 1.10}


def offloaded(stage: int, rounds: int) -> list[Row]:
    """32 Mi bf16 parameters, clipped: engine.step(), and the optimizer's share of it.

    In several processes, because where the memory of one happens to lie moves its ratios by a tenth.
    """
    share: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    whole: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(PROCESSES):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            shares, steps = process.submit(_measured, stage, -(-rounds // PROCESSES), torch.get_num_threads()).result()
        for name in CONTESTANTS:
            share[name] += shares[name]
            whole[name] += steps[name]
    rows = []
    for name in CONTESTANTS:
        rows.append(compare(f"ZeRO-{stage} offload, optimizer", name, share, OFFLOAD_PEER, BARS.get(name)))
        rows.append(compare(f"ZeRO-{stage} offload, engine.step()", name, whole, OFFLOAD_PEER))
    return rows


def _measured(stage: int, rounds: int, threads: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the optimizer's share and of engine.step(), round by round, measured in this process."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(None, init_method=f"file://{folder}/store", rank=0, world_size=1)
        engines = {name: engine_of(stage, name) for name in CONTESTANTS}
        shares = {name: _timed(engine.optimizer) for name, engine in engines.items()}
        steps: Steps = {name: engine.step for name, engine in engines.items()}
        backwards: Steps = {name: partial(backward, engine) for name, engine in engines.items()}
        seconds = take_turns(steps, rounds, torch.device("cpu"), backwards)
        dist.destroy_process_group()
    return {name: times[1:] for name, times in shares.items()}, seconds


def engine_of(stage: int, name: str) -> Any:
    """A DeepSpeed engine over 32 Mi bf16 parameters a rank with one of the contestants on the CPU."""
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists
    options = {"lr": 1e-3, "sync": name.removeprefix("AlphaAdam "), "fused": True}
    adam = {"type": "AdamW", "params": {"lr": 1e-3}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "optimizer": adam if name == OFFLOAD_PEER else {"type": "AlphaAdam", "params": options},
    }
    model = _Sum(2 * dist.get_world_size())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


class _Sum(nn.Module):
    """Matrices of 16 Mi elements and next to no work beside their gradients."""

    def __init__(self, matrices: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4096, 4096)) for _ in range(matrices)])

    def forward(self, seed: Tensor) -> Tensor:
        return torch.stack([(weight * seed).sum() for weight in self.weights]).sum()


def backward(engine: Any) -> None:
    """One forward and backward."""
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
