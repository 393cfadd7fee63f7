"""AlphaAdam for sharded training: one algorithm, any sharding.

Importing the package registers its optimizers with DeepSpeed and HF's Trainer, whenever these are imported.
"""

from .alphaadam import AlphaAdam
from .alphalion import AlphaLion
from .alphasgd import AlphaSGD
from .integrations import hf_trainer
from .zero import register

__version__ = "0.1.0"
__all__ = ["AlphaAdam", "AlphaLion", "AlphaSGD"]


def _register() -> None:
    """Register with the tools that are imported or will be. Again and again changes nothing more."""
    register(AlphaAdam, AlphaLion, AlphaSGD)
    hf_trainer.register(AlphaAdam, AlphaLion, AlphaSGD)


_register()
