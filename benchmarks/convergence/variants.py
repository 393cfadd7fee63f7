"""The optimizers that are compared, under the names that tables and plots use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import AdamW, Optimizer

from alphaadam_dist import AlphaAdam, AlphaLion
from benchmarks import baselines

MATCHED = "matched"
"""The threshold (1 - beta1) / beta1, at which the mask is a sign test on the updated momentum."""
EVERY = ("rate", "beta1", "embedding")
AHEAD = (*EVERY, "lookahead")


@dataclass(frozen=True)
class Variant:
    """One optimizer with its options.

    Args:
        options: the optimizer's own; also "beta2", "warmup", a share of the steps, and the threshold MATCHED.
        axes: what is tuned.
        start: the variant from whose best setting the search goes out, where it has none of its own in a shorter run
            or a smaller model.
        begin: what differs from that setting.
        lr_scale: multiplies every learning rate, so that the search starts near its best, and divides the weight decay,
            so that their product is that of the others.
        ramp: what lookahead is multiplied by in the first step and in the last, on a straight line between them.
        bf16_parameters: it steps bf16 copies of the model's parameters.
    """

    name: str
    optimizer: Callable[..., Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = EVERY
    start: str = "AdamW"
    begin: dict[str, float] = field(default_factory=dict)
    lr_scale: float = 1.0
    ramp: tuple[float, float] | None = None
    bf16_parameters: bool = False


ADAMW, NADAMW, ALPHAADAM, LOOKAHEAD, BOTH = "AdamW", "NAdamW", "AlphaAdam", "look-ahead", "AlphaAdam + look-ahead"
# asked for, because models of less than a million parameters don't get the fast kernels by themselves
FAST = {"fused": True}
# the released code's
MGUP = {"eps": 1e-6}
LION = {"beta2": 0.99}
UNMASKED = {**FAST, "gamma": 1.0}
OPTION: dict[str, Any] = {"axes": ("rate",), "start": ALPHAADAM}
TRIED: dict[str, Any] = {"axes": AHEAD, "start": LOOKAHEAD}

CORE = (
    Variant(ADAMW, AdamW, FAST),
    Variant(NADAMW, baselines.NAdamW),
    Variant(ALPHAADAM, AlphaAdam, FAST),
    Variant(LOOKAHEAD, AlphaAdam, UNMASKED, axes=AHEAD, begin={"lookahead": 0.25}),
    Variant(BOTH, AlphaAdam, FAST, axes=(*AHEAD, "gamma"), start=LOOKAHEAD, begin={"gamma": 0.5}),
    Variant("CMGUP", baselines.CMGUPAdamW, MGUP),
)
"""What the defaults depend on, and the best of the other masks."""

OPTIONS = (
    Variant("AlphaAdam delayed", AlphaAdam, {**FAST, "sync": "delayed"}, **OPTION),
    Variant("AlphaAdam layer", AlphaAdam, {**FAST, "scope": "layer"}, **OPTION),
    Variant("AlphaAdam tau matched", AlphaAdam, {**FAST, "threshold": MATCHED}, **OPTION),
    Variant("AlphaAdam tau 0.2", AlphaAdam, {**FAST, "threshold": 0.2}, **OPTION),
    Variant("AlphaAdam gamma 0.1", AlphaAdam, {**FAST, "gamma": 0.1}, **OPTION),
    Variant("AlphaAdam gamma 0.5", AlphaAdam, {**FAST, "gamma": 0.5}, **OPTION),
    Variant("AlphaAdam warm-up", AlphaAdam, {**FAST, "warmup": 0.2}, **OPTION),
    Variant("constant alpha", baselines.ConstantAlpha, {"alpha": 2.0}, **OPTION),
    Variant("random mask", baselines.RandomMask, **OPTION),
)
"""AlphaAdam's options, and the two controls that take it apart, from AlphaAdam's best setting with the rate anew."""

PEERS = (
    Variant("C-AdamW", baselines.CAdamW),
    Variant("MGUP", baselines.MGUPAdamW, MGUP),
    Variant("CMGUP, evidence only", baselines.CMGUPAdamW, {**MGUP, "evidence": True}),
    Variant("Lion", baselines.Lion, LION, lr_scale=0.5),
    Variant("AlphaLion", AlphaLion, {**FAST, **LION}, lr_scale=0.25),
    Variant("AlphaLion tau matched", AlphaLion, {**FAST, **LION, "threshold": MATCHED}, lr_scale=0.5),
)

TRIALS = (
    Variant("look-ahead, falling", baselines.LookAhead, ramp=(2.0, 0.0), **TRIED),
    Variant("look-ahead, rising", baselines.LookAhead, ramp=(0.0, 2.0), **TRIED),
    Variant("look-ahead, slow", AlphaAdam, UNMASKED, begin={"beta1": 0.99, "lookahead": 1.0}, **TRIED),
    Variant("look-ahead, cautious decay", baselines.LookAhead, {"cautious_decay": True}, **TRIED),
)
"""Ideas inside the paper's frame. What beats AlphaAdam and look-ahead at 4x on two tasks earns an option."""

VARIANTS = (*CORE, *OPTIONS, *PEERS)

BF16 = {"state_dtype": "bfloat16"}
PRECISIONS = tuple(
    Variant(f"{name}, beta2 {beta2}", kind, {**options, "beta2": beta2}, bf16_parameters="parameters" in name)
    for beta2 in (0.95, 0.999)
    for name, kind, options in (
        ("fp32", AlphaAdam, FAST),
        ("bf16 state", AlphaAdam, {**FAST, **BF16}),
        ("bf16 state to the nearest", baselines.RoundsToNearest, BF16),
        ("bf16 parameters and state", AlphaAdam, {**FAST, **BF16}),
        ("bf16 parameters and state to the nearest", baselines.RoundsToNearest, BF16),
    )
)
"""AlphaAdam with its defaults, for the comparison of precisions: each beta2's others are compared with its first."""

BY_NAME = {variant.name: variant for variant in (*VARIANTS, *TRIALS, *PRECISIONS)}
