"""Which DeepSpeed is served, and what to say of another: known without importing it."""

import functools
import sys
import warnings
from collections.abc import Sequence

from ..torch_versions import numbers

TESTED = ("0.15.4", "0.19.8")
"""The oldest and the newest DeepSpeed that the tests run with."""

PARTS = {
    "engine": "all of DeepSpeed",
    "stage_1_and_2": "ZeRO stages 1 and 2",
    "DeepSpeedZeroOptimizer_Stage3": "ZeRO stage 3",
    "stage3": "ZeRO stage 3",
    "DeepSpeedZeroOptimizer": "ZeRO stages 1 and 2",
    "BF16_Optimizer": "bf16 at stage 1",
    "bf16_optimizer": "bf16 at stage 1",
    "FP16_UnfusedOptimizer": "bf16 and fp16 at stage 0",
    "unfused_optimizer": "bf16 and fp16 at stage 0",
    "universal": "universal checkpoints",
}
"""What stops working, by a word in the name that is missing."""


def installed() -> str | None:
    """The version of the DeepSpeed that is imported; None where it does not say."""
    return getattr(sys.modules.get("deepspeed"), "__version__", None)


def before(version: str) -> bool:
    """The imported DeepSpeed is older than this."""
    return () < numbers(installed() or "") < numbers(version)


def unserved(missing: Sequence[str]) -> RuntimeError:
    """The error for names that are not where the tested versions have them, with what they are for."""
    parts = dict.fromkeys(part for name in missing for word, part in PARTS.items() if word in name.split("."))
    affected = f" (affected: {', '.join(parts)})" if parts else ""
    oldest, newest = TESTED
    found, names = installed() or "of an unknown version", ", ".join(missing)
    if before(oldest):
        said = f"{found}, which is too old: it has not yet {names}{affected}. Upgrade: deepspeed>={oldest}"
    else:
        said = f"{found}, which has moved: it no longer has {names}{affected}. Install a tested version: "
        said += f"deepspeed>={oldest},<={newest}"
    return RuntimeError(f"alphaadam_dist cannot run under DeepSpeed {said}")


@functools.cache
def warn_untested() -> None:
    """Warn, once, where the imported DeepSpeed is none that was tested, though it has every name."""
    oldest, newest = TESTED
    if installed() and (before(oldest) or not before(f"{newest}.1")):
        warnings.warn(
            f"alphaadam_dist was tested with DeepSpeed {oldest} to {newest}, and this is {installed()}. It has every "
            "name that is needed, so it will be used; `alphaadam verify` compares its steps with one process's",
            stacklevel=2,
        )
