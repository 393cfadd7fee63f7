"""AlphaSGD: the family's SGD with momentum."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import options, rule
from .optimizer import AlphaOptimizer


class AlphaSGD(AlphaOptimizer):
    """SGD that steps further where momentum and gradient agree, and holds back where they conflict.

    Build it after sharding and use it like torch.optim.SGD, whose checkpoints load here and back.

    Args:
        params: tensors, named_parameters() or groups of either; plain tensors or DTensors.
        lr: learning rate, SGD's. A one-element tensor is taken too. Per group, where the
            key ``lr_scale`` (1.0) multiplies it.
        momentum: what stays of the momentum from step to step, more than 0: the masks read it. Per group.
        weight_decay: decoupled (torch.optim.SGD's is not), never masked. Per group.
        nesterov: step along the gradient plus the decayed momentum. Per group.
        family: the options of FamilyOptions.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range, options that contradict each other, a parameter of a kind not served.
    """

    direction = staticmethod(rule.sgd_)
    moments = ("momentum_buffer",)
    hyperparameters = ("lr", "momentum", "nesterov", "weight_decay")
    fixed: ClassVar = {"dampening": 0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **family: Unpack[options.Options],
    ) -> None:
        hyperparameters = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters, **family)

    @classmethod
    def check_hyperparameters(cls, group: Mapping[str, Any]) -> None:
        """Check momentum and nesterov of a parameter group. Raises ValueError."""
        rule_of_momentum = "it must be more than 0, because the masks read it, and less than 1"
        options.check_number("momentum", group["momentum"], rule_of_momentum, math.ulp(0.0), 1, below=True)
        options.check_flag("nesterov", group["nesterov"])

    def _check_saved(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError where a saved state does not fit; warn where its weight decay means something else."""
        super()._check_saved(state_dict)
        for group in state_dict["param_groups"]:
            if group.get("weight_decay") and "alphaadam_state" not in group:
                warnings.warn(
                    f"the checkpoint is torch.optim.SGD's, which adds weight_decay={group['weight_decay']!r} to the "
                    "gradient; AlphaSGD's decay is decoupled and with momentum weaker: set group['weight_decay']",
                    stacklevel=3,
                )
