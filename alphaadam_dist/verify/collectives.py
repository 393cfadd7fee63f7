"""Counts the collectives of a call on the wire's side of torch, so that nobody has to be believed."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMESPACES = ("c10d", "_c10d_functional")
NOT_COLLECTIVE = ("wait_tensor", "barrier", "monitored_barrier_")


class Collectives(TorchDispatchMode):
    """Inside the context ``seen`` counts (name, bytes of all tensors given to it) of every collective asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")
        if name[0] in NAMESPACES and name[1] not in NOT_COLLECTIVE:
            size = sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.seen[name[1], size] += 1
        return func(*args, **(kwargs or {}))
