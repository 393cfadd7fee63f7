"""How far momentum and gradient agree in each parameter group, for whoever asks between a backward and its step."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import rank_failures
from .kernels import consensus
from .layout import Layout
from .local_tensors import counted, local_tensors
from .persistence import Persistent
from .tensors import is_dtensor, local


def counts_by_group(optimizer: Persistent, layout: Layout) -> Tensor:
    """Agreeing and conflicting coordinates of the gradients that are there now: float64 (groups, 2). Collective.

    Mutates nothing. Raises RuntimeError where a rank failed.
    """
    options = optimizer._run.options
    counts = torch.zeros((len(optimizer.param_groups), 2), dtype=torch.float64, device=layout.device)

    def state_of(param: Tensor) -> dict[str, Any]:
        """What there is of it, or the momentum that its first step would begin with."""
        held: dict[str, Any] = optimizer.state.get(param, {})
        first = optimizer.moments[0]
        return held if first in held else {first: torch.zeros_like(param if is_dtensor(param) else local(param))}

    for i, group in enumerate(optimizer.param_groups):
        states = {param: state_of(param) for param in group["params"] if param.grad is not None}
        held = local_tensors(group["params"], layout, states, optimizer.moments[:1], lambda param: None)
        for _, grads, momenta in counted(held, layout):
            kernels = consensus.choose(options, layout, grads[0].device)
            some, _ = kernels.count(
                grads, momenta, threshold=options.threshold, scale=-1.0 if options.maximize else None,
                wide=options.state_dtype is not None,
            )  # fmt: skip
            counts[i] += some.sum(0).to(counts)
    if layout.group is not None:
        with rank_failures.explaining("all-reduce of the counts by parameter group", layout.group):
            dist.all_reduce(counts, group=layout.group)
    return counts
