"""torchtitan: ``optimizer = alphaadam(lr=3e-4, sync="delayed")`` in a trainer's config."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

import alphaadam_dist
from alphaadam_dist.groups import read


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


def alphaadam(
    lr: float, weight_decay: float = 0.1, groups: Sequence[Mapping[str, Any]] = (), **options: Any
) -> AlphaOptimizers.Config:
    """The config of AlphaAdam over all parameters, with options of FamilyOptions and ``groups`` of parameter_groups.

    Raises ValueError where an entry is not one that parameter_groups takes.
    """
    rest = {"lr": lr, "weight_decay": weight_decay, "fused": None}  # not what `implementation` says
    entries = read(groups, alphaadam_dist.AlphaAdam, "groups") if groups else []
    cut = [(pattern.pattern, entry.values) for entry in entries for _, pattern in entry.patterns]
    return AlphaOptimizers.Config(
        implementation="for-loop",
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name="AlphaAdam", optimizer_kwargs={**rest, **values})
            for pattern, values in [*cut, (".*", {})]
        ],
        optimizer_factory_kwargs_by_name={"AlphaAdam": options},
    )
