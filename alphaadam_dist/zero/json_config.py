"""Builds the optimizer that a DeepSpeed JSON names.

DeepSpeed puts all parameters of a JSON-named optimizer into one group. ``"groups"`` among the optimizer's params, a
list as parameter_groups takes it, cuts that by the parameters' names; ``"no_decay": ["bias", "norm"]`` is short for an
entry without decay.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import groups
from ..optimizer import AlphaOptimizer
from . import parallel


def build(kind: type[AlphaOptimizer], engine: Any, model_parameters: Iterable[Any]) -> AlphaOptimizer:
    """An optimizer of a class over DeepSpeed's parameters or groups, with the params of the config.

    Raises:
        TypeError: the config has an option that the class does not.
        ValueError: an option out of range, or ``groups`` or ``no_decay`` that parameter_groups would not take.
    """
    params = dict(engine.optimizer_params() or {})
    entries, words = params.pop("groups", None), params.pop("no_decay", None)
    if entries is not None and words is not None:
        raise ValueError(
            f"optimizer.params has groups and no_decay={words!r}: give groups alone, with "
            '{"match": "(?i)bias|norm", "weight_decay": 0.0} as the last entry in place of no_decay'
        )
    if entries is None and words is None:
        return kind(model_parameters, **params)
    if entries is None:
        chosen = [groups.no_decay(words, "optimizer.params.no_decay")]
    else:
        chosen = groups.read(entries, kind, "optimizer.params.groups")
    names = groups.named_parameters(engine.module)
    held = _groups(model_parameters, names)
    return kind(groups.split(held, chosen, parallel.with_other_stages(engine, names)), **params)


def _groups(model_parameters: Iterable[Any], names: Mapping[Tensor, Sequence[str]]) -> list[dict[str, Any]]:
    """DeepSpeed's parameters or groups as groups, with names where all are the model's: by these a load can tell that
    entries have changed places.
    """
    given = list(model_parameters)
    made = given if given and isinstance(given[0], dict) else [{"params": given}]
    made = [{**group, "params": list(group["params"])} for group in made]
    if any(isinstance(item, tuple) or item not in names for group in made for item in group["params"]):
        return made
    return [{**group, "params": [(names[param][0], param) for param in group["params"]]} for group in made]
