"""Acts on a module as soon as somebody imports it, without importing it.

Under `alphaadam run` every Python process loads this file at its start, by itself: it imports nothing that costs time,
and an older Python can read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

DEEPSPEED_ENGINE = "deepspeed.runtime.engine"
HF_ARGUMENTS, HF_TRAINER = "transformers.training_args", "transformers.trainer"
TOOLS = (DEEPSPEED_ENGINE, HF_ARGUMENTS, HF_TRAINER)
"""What the optimizers are registered with as soon as it is imported."""


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call ``act`` with a module now, or once it has been imported.

    ``act`` may be called again for the same module. What it raises fails the import.
    """
    module = sys.modules.get(name)
    if module is not None:
        act(module)
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder:
    """Finds one module as the other finders do, and acts on it once it has run."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self._act = name, act
        self._asked = False  # by itself, through a finder that asks all others

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What importlib asks of every finder; None leaves the module to the others."""
        if name != self.name or self._asked:
            return None
        self._asked = True
        try:
            others = (getattr(finder, "find_spec", None) for finder in sys.meta_path if finder is not self)
            found = (find(name, path, target) for find in others if find is not None)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._asked = False
        execute = getattr(spec and spec.loader, "exec_module", None)
        if spec is not None and execute is not None:

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == self.name:  # a zip's loader is that of all modules in it
                    self._act(module)

            spec.loader.exec_module = execute_and_act
        return spec
