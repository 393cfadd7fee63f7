"""AlphaAdam for sharded training: one algorithm, any sharding.

Importing the package registers its optimizers with DeepSpeed and HF's Trainer, whenever these are imported. It imports
neither of them, nor torch: the optimizers are loaded when they are first asked for, or when such a tool comes. So the
command line answers at once.
"""

from typing import TYPE_CHECKING, Any

from .import_hook import TOOLS, when_imported

if TYPE_CHECKING:
    from .alphaadam import AlphaAdam
    from .alphalion import AlphaLion
    from .alphasgd import AlphaSGD
    from .groups import parameter_groups

__version__ = "0.1.0"
__all__ = ["AlphaAdam", "AlphaLion", "AlphaSGD", "parameter_groups"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(*_: object) -> None:
    """Load the optimizers and register them with the tools that are imported. Again and again changes nothing more."""
    from .alphaadam import AlphaAdam
    from .alphalion import AlphaLion
    from .alphasgd import AlphaSGD
    from .groups import parameter_groups
    from .integrations import hf_trainer
    from .zero import register

    globals().update(AlphaAdam=AlphaAdam, AlphaLion=AlphaLion, AlphaSGD=AlphaSGD, parameter_groups=parameter_groups)
    register(AlphaAdam, AlphaLion, AlphaSGD)
    hf_trainer.register(AlphaAdam, AlphaLion, AlphaSGD)


for _tool in TOOLS:
    when_imported(_tool, _register)
