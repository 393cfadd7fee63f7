"""AlphaAdam for sharded training: one algorithm, any sharding.

Importing the package registers AlphaAdam with DeepSpeed where DeepSpeed is installed.
"""

from importlib.util import find_spec

from .optimizer import AlphaAdam

__version__ = "0.1.0"
__all__ = ["AlphaAdam"]

if find_spec("deepspeed") is not None:
    from .zero.attach import register

    register()
