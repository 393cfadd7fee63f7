"""torchtitan: ``optimizer = alphaadam(lr=3e-4, sync="delayed")`` in a trainer's config."""

from dataclasses import dataclass
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

import alphaadam_dist


class AlphaOptimizers(OptimizersContainer):
    """torchtitan's container, whose groups may also name AlphaAdam, AlphaLion and AlphaSGD."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """OptimizersContainer.Config, which builds this container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        if name in alphaadam_dist.__all__ and isinstance(kind := getattr(alphaadam_dist, name), type):
            return kind
        return OptimizersContainer._resolve_optimizer_factory(name)


def alphaadam(lr: float, weight_decay: float = 0.1, **options: Any) -> AlphaOptimizers.Config:
    """The config of AlphaAdam over all parameters, in one group, with options of FamilyOptions."""
    group = {"lr": lr, "weight_decay": weight_decay, "fused": None}  # not what `implementation` says
    return AlphaOptimizers.Config(
        implementation="for-loop",
        param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="AlphaAdam", optimizer_kwargs=group)],
        optimizer_factory_kwargs_by_name={"AlphaAdam": options},
    )
