"""AlphaLion: the family's Lion."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import options, rule
from .optimizer import AlphaOptimizer


class AlphaLion(AlphaOptimizer):
    """Lion (arXiv 2302.06675) that steps further where momentum and gradient agree, and holds back where they conflict.

    Lion's direction is a sign, so f alone says how far a coordinate moves.

    Args:
        params: tensors, named_parameters() or groups of either; plain tensors or DTensors.
        lr: learning rate, Lion's: 3 to 10 times smaller than AdamW's. A one-element tensor is taken too. Per group,
            where the key ``lr_scale`` (1.0) multiplies it.
        betas: weight of the momentum in the direction, and its decay rate. Per group.
        weight_decay: decoupled, never masked; 3 to 10 times larger than AdamW's. Per group.
        family: the options of FamilyOptions.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range, options that contradict each other, a parameter of a kind not served.
    """

    direction = staticmethod(rule.lion_)
    moments = ("exp_avg",)
    hyperparameters = ("lr", "betas", "weight_decay")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **family: Unpack[options.Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **family)

    @classmethod
    def check_hyperparameters(cls, group: Mapping[str, Any]) -> None:
        """Check betas of a parameter group. Raises ValueError."""
        options.check_betas(group["betas"])
