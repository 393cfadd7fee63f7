"""AlphaAdam: the family's AdamW."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import options, rule
from .optimizer import AlphaOptimizer


class AlphaAdam(AlphaOptimizer):
    """AdamW that steps where momentum and gradient agree, holds back where they conflict, and makes up for it.

    Build it after sharding and use it like torch.optim.AdamW, whose checkpoints load here and back.

    Args:
        params: tensors, named_parameters() or groups of either; plain tensors or DTensors.
        lr: learning rate, AdamW's. A one-element tensor is taken too. Per group, where the
            key ``lr_scale`` (1.0) multiplies it.
        betas: decay rates of the first and second moment. Per group.
        eps: added to the root of the second moment. Per group.
        weight_decay: decoupled, never masked. Per group.
        family: the options of FamilyOptions.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range, options that contradict each other, a parameter of a kind not served.
    """

    direction = staticmethod(rule.adam_)
    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True
    looks_ahead = True
    hyperparameters = ("lr", "betas", "eps", "weight_decay")
    fixed: ClassVar = {"amsgrad": False, "decoupled_weight_decay": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **family: Unpack[options.Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **family)

    @classmethod
    def check_hyperparameters(cls, group: Mapping[str, Any]) -> None:
        """Check betas and eps of a parameter group. Raises ValueError."""
        options.check_betas(group["betas"])
        options.check_number("eps", group["eps"], "it must be 0 or more", 0)
