"""AlphaAdam for sharded training: one algorithm, any sharding.

Importing the package registers its optimizers with DeepSpeed, whenever that is imported. It imports neither torch nor
DeepSpeed: the optimizers are loaded when they are first asked for, or when DeepSpeed's engine comes. So the command
line answers at once.
"""

from typing import TYPE_CHECKING, Any

from .import_hook import DEEPSPEED_ENGINE, when_imported

if TYPE_CHECKING:
    from .alphaadam import AlphaAdam
    from .alphalion import AlphaLion
    from .alphasgd import AlphaSGD

__version__ = "0.1.0"
__all__ = ["AlphaAdam", "AlphaLion", "AlphaSGD"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _load(*_: object) -> None:
    from .alphaadam import AlphaAdam
    from .alphalion import AlphaLion
    from .alphasgd import AlphaSGD
    from .zero import register

    globals().update(AlphaAdam=AlphaAdam, AlphaLion=AlphaLion, AlphaSGD=AlphaSGD)
    register(AlphaAdam, AlphaLion, AlphaSGD)


when_imported(DEEPSPEED_ENGINE, _load)
