"""Which DeepSpeed is served, and what to say of another: known without importing it."""

import sys
from collections.abc import Sequence

TESTED_VERSIONS = ("0.19.7", "0.19.8")


def moved(missing: Sequence[str]) -> RuntimeError:
    """The error for names that are not where the tested versions have them."""
    version = getattr(sys.modules.get("deepspeed"), "__version__", "of an unknown version")
    return RuntimeError(
        f"alphaadam_dist cannot run under DeepSpeed {version}: it no longer has {', '.join(missing)}, "
        f"through which the model is counted. Install a tested version (deepspeed=={' or '.join(TESTED_VERSIONS)})"
    )
