"""What is tried of the optimizers' options."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer

from ..alphaadam import AlphaAdam
from ..alphalion import AlphaLion
from ..alphasgd import AlphaSGD

LR = 1e-4
CLIP = {"clip_norm": 2.5}


@dataclass(frozen=True, eq=False)
class Setting:
    """An optimizer and its options.

    Attributes:
        fast: on the fast kernels, where there are any.
        collectives: how many a step may take beyond AdamW's.
    """

    name: str
    options: Mapping[str, Any]
    kind: type[Optimizer] = AlphaAdam
    fast: bool = True
    collectives: int = 1

    def optimizer(self, named: Iterable[tuple[str, Tensor]], fast: bool, **instead: Any) -> Optimizer:
        """Build it over named parameters, on the ``fast`` kernels or not. ``instead``: options that win."""
        if self.kind is AdamW:
            return AdamW(named, **self.options)
        return self.kind(named, **{"lr": LR, "fused": fast and self.fast, **self.options, **instead})


ADAMW = Setting("AdamW", {"lr": LR, "foreach": False}, AdamW)
EXACT = Setting("exact", {})
DELAYED = Setting("delayed", {"sync": "delayed"})
LAYER = Setting("layer", {"scope": "layer"})
CLIPPED = Setting("clip", CLIP)
THRESHOLD = Setting("threshold", {**CLIP, "threshold": 0.1}, collectives=2)  # it must know the norm before it counts
LOOKAHEAD = Setting("look-ahead", {"lookahead": 0.25, "gamma": 1.0}, collectives=0)  # without masks nothing is counted
REFERENCE = Setting("reference", {}, fast=False)
LION = Setting("AlphaLion", {}, AlphaLion)
SGD = Setting("AlphaSGD", {"lr": 0.01}, AlphaSGD)
