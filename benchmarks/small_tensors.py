"""What a step of many small tensors costs the host, what the first one costs, and what one odd tensor does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from alphaadam_dist import AlphaAdam
from benchmarks.turns import FUSED, Row, Steps, compare, take_turns

MODES: dict[str, dict[str, Any]] = {
    "exact": {}, "delayed": {"sync": "delayed"}, "clip_norm": {"clip_norm": 1.0}, "layer": {"scope": "layer"},
}  # fmt: skip
BARS = {"plain": 1.0, "DTensors": 0.45}
NORMAL = "AlphaAdam, no odd one"
ODD = {"gradient transposed": 1.1, "channels_last": 1.1}
"""Kinds of an odd tensor in a list of 16 that kernels can serve, and the bar against a list without."""

Make = Callable[[Tensor], Tensor]
Named = list[tuple[str, nn.Parameter]]


def small_tensors(rounds: int, device: torch.device) -> list[Row]:
    """300 and 10,000 plain tensors of 1024 elements, and 300 DTensors, as FSDP2 has them."""
    mesh = init_device_mesh(device.type, (1,))
    rows = []
    makes: dict[str, Make] = {
        "plain": lambda each: each,
        "DTensors": lambda each: distribute_tensor(each, mesh, [Shard(0)]),
    }
    for kind, count in (("plain", 300), ("plain", 10_000), ("DTensors", 300)):
        make = makes[kind]
        steps: Steps = {FUSED: torch.optim.AdamW(_named(count, device, make), fused=True).step}
        for name, options in MODES.items():
            group = dist.group.WORLD if kind == "DTensors" else None
            steps[f"AlphaAdam {name}"] = AlphaAdam(
                _named(count, device, make), fused=True, process_group=group, **options
            ).step  # fmt: skip
        seconds = take_turns(steps, 3 * rounds if count == 300 else rounds, device)
        for name in steps:
            rows.append(compare(f"{count:,} {kind}", name, seconds, FUSED, None if name == FUSED else BARS[kind]))
    return rows


def _named(count: int, device: torch.device, make: Make) -> Named:
    named = []
    for i in range(count):
        param = nn.Parameter(make(torch.randn(64, 16, device=device)))
        param.grad = make(torch.randn(64, 16, device=device))
        named.append((f"w{i}", param))
    return named


def start_up(device: torch.device) -> float:
    """Seconds from 10,000 parameters to an optimizer that has stepped, less those of its second step."""
    named = _named(10_000, device, lambda each: each)
    gc.collect()
    start = time.perf_counter()
    optimizer = AlphaAdam(named, fused=True)
    optimizer.step()
    stepped = time.perf_counter()
    optimizer.step()
    return (stepped - start) - (time.perf_counter() - stepped)


def one_odd_tensor(rounds: int, device: torch.device) -> list[Row]:
    """Lists of 16 tensors of 64 Ki elements, in one of which the first is odd."""

    def build(odd: str | None) -> Callable[[], object]:
        shape = (16, 16, 16, 16)
        params = [nn.Parameter(torch.randn(shape, device=device)) for _ in range(16)]
        if odd == "channels_last":
            params[0] = nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))
        for param in params:
            param.grad = torch.randn_like(param)
        if odd == "gradient transposed":
            params[0].grad = params[0].grad.mT.contiguous().mT  # type: ignore[union-attr]
        return AlphaAdam(params, fused=True).step

    steps: Steps = {NORMAL: build(None), **{f"AlphaAdam, {odd}": build(odd) for odd in ODD}}
    seconds = take_turns(steps, 3 * rounds, device)
    return [compare("16 tensors", f"AlphaAdam, {odd}", seconds, NORMAL, bar) for odd, bar in ODD.items()]
