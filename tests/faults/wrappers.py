"""Wrappers that pass for the optimizer that they hold, by a class made from its class, as trainers write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Imitation:
    """``isinstance`` says that it is the optimizer's class; methods and properties of that class run on this object."""

    _optimizer: Any

    def _imitate(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type(f"Wrapped{type(optimizer).__name__}", (type(self), type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._optimizer.step(closure)


class Attributes(_Imitation):
    """What it does not have itself it looks up at the optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self._imitate(optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Copied(_Imitation):
    """It takes over the optimizer's attributes as they are when it is built."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}
        self._imitate(optimizer)


WRAPPERS = {"attributes": Attributes, "copied": Copied}
