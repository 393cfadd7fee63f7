"""AlphaAdam for sharded training: one algorithm, any sharding.

Importing the package registers its optimizers with DeepSpeed where DeepSpeed is installed.
"""

from importlib.util import find_spec

from .alphaadam import AlphaAdam
from .alphalion import AlphaLion
from .alphasgd import AlphaSGD

__version__ = "0.1.0"
__all__ = ["AlphaAdam", "AlphaLion", "AlphaSGD"]

if find_spec("deepspeed") is not None:
    from .zero.attach import register

    register(AlphaAdam, AlphaLion, AlphaSGD)
