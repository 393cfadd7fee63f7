"""Flat vectors cut in two over two ranks, beside the same vectors whole in one process."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam

from .problems import gradients, memory_of, parameters_of, same_bits, tensors

LENGTHS = (101, 64, 1, 2)  # of flat parameters; rank 0 gets 37 percent of each, rank 1 the rest


def mine(flat: Tensor) -> Tensor:
    """This rank's part of a flat vector cut in two unevenly; of one element rank 0 holds nothing."""
    at = int(0.37 * len(flat))
    return (flat[:at] if dist.get_rank() == 0 else flat[at:]).clone()


def flats() -> list[Tensor]:
    return tensors(3, shapes=[(n,) for n in LENGTHS])


def steps_of(count: int, seed: int = 1) -> list[list[Tensor]]:
    steps = gradients(count, shapes=[(n,) for n in LENGTHS], seed=seed)
    return [[g for g in step if g is not None] for step in steps]


def pair(**options: Any) -> tuple[AlphaAdam, AlphaAdam]:
    """The flats cut over two ranks, and whole in this one."""
    hyper: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), **options}
    cut = AlphaAdam([nn.Parameter(mine(p)) for p in flats()], sharding="sharded", **hyper)
    return cut, AlphaAdam([nn.Parameter(p) for p in flats()], **hyper)


def differences(cut: AlphaAdam, whole: AlphaAdam) -> list[str]:
    wrong = []
    for i, (p, q) in enumerate(zip(parameters_of(cut), parameters_of(whole), strict=True)):
        wrong += [] if same_bits(p, mine(q.detach())) else [f"parameter {i}"]
        for name in ("exp_avg", "exp_avg_sq"):
            wrong += [] if same_bits(cut.state[p][name], mine(whole.state[q][name])) else [f"{name} of {i}"]
    if memory_of(cut) != memory_of(whole):
        wrong.append(f"memory {memory_of(cut)} and {memory_of(whole)}")
    if cut.agreement != whole.agreement:
        wrong.append(f"agreement {cut.agreement} and {whole.agreement}")
    return wrong
