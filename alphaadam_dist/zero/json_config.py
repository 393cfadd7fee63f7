"""Builds the optimizer that a DeepSpeed JSON names.

DeepSpeed puts all parameters of a JSON-named optimizer into one group, so weight decay hits norms and biases too.
``"no_decay": ["bias", "norm"]`` among the optimizer's params takes the parameters whose name contains one of these
words, in any case, into a group without decay.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..optimizer import AlphaOptimizer


def build(kind: Callable[..., AlphaOptimizer], engine: Any, model_parameters: Iterable[Any]) -> AlphaOptimizer:
    """An optimizer of a class over DeepSpeed's parameters or groups, with the params of the config.

    Raises:
        TypeError: the config has an option that the class does not.
        ValueError: an option out of range, or a word of ``no_decay`` that is in no parameter's name.
    """
    params = dict(engine.optimizer_params() or {})
    words = params.pop("no_decay", None)
    if words is None:
        return kind(model_parameters, **params)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f'optimizer.params.no_decay={words!r}: give a list of words, as in ["bias", "norm"]')
    words = [word.lower() for word in words]
    names = {param: name.lower() for name, param in engine.module.named_parameters()}
    for word in words:
        if not any(word in name for name in names.values()):
            raise ValueError(
                f"optimizer.params.no_decay has {word!r}, which is in no parameter's name: remove it. Names are like "
                f"{', '.join(sorted(names.values())[:5])}"
            )

    def decays(param: Tensor) -> bool:
        return not any(word in names.get(param, "") for word in words)

    groups: list[dict[str, Any]] = []
    for given in _groups(model_parameters):
        decayed = [param for param in given["params"] if decays(param)]
        spared = [param for param in given["params"] if not decays(param)]
        groups += [{**given, "params": decayed}] if decayed else []
        groups += [{**given, "params": spared, "weight_decay": 0.0}] if spared else []
    return kind(groups, **params)


def _groups(model_parameters: Iterable[Any]) -> list[dict[str, Any]]:
    given = list(model_parameters)
    return given if given and isinstance(given[0], dict) else [{"params": given}]
