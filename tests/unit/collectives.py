"""Sees every collective that is started inside it, however it was started, with its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """``calls``: (name, bytes of the tensors given) of each collective operation of torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let the DTensor take it apart, and see what it does
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.calls.append((func._opname.rstrip("_"), sum(t.numel() * t.element_size() for t in given)))
        return func(*args, **(kwargs or {}))
