"""The optimizers that are compared, under the names that tables and plots use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import AdamW, Optimizer

from alphaadam_dist import AlphaAdam, AlphaLion
from benchmarks import baselines

# as language models are trained; Lion's betas are its own
BETAS, LION_BETAS = (0.9, 0.95), (0.9, 0.99)
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Variant:
    """One optimizer with its options.

    Args:
        lr_scale: its learning rates are the task's grid times this, so that its best ones lie inside the grid, and its
            weight decay is divided by it, so that their product is that of the others.
        controlled: goes on to the controls: no clipping, twice the learning rate, the embedding's learning rate, longer
            training.
        bf16_parameters: it steps bf16 copies of the model's parameters.
    """

    name: str
    optimizer: Callable[..., Optimizer]
    options: dict[str, Any]
    lr_scale: float = 1.0
    controlled: bool = False
    bf16_parameters: bool = False

    def build(self, groups: list[dict[str, Any]], lr: float, *, steps: int, seed: int) -> Optimizer:
        """The optimizer over ``groups``, whose own "scale" multiplies ``lr``. "warmup" is a share of ``steps``."""
        options = {"betas": BETAS, **self.options}
        if "warmup" in options:
            options["alpha_warmup"] = round(options.pop("warmup") * steps)
        if self.optimizer is baselines.RandomMask:
            options["seed"] = seed
        scaled = [{"params": g["params"], "lr": lr * g["scale"]} for g in groups]
        return self.optimizer(scaled, lr=lr, weight_decay=WEIGHT_DECAY / self.lr_scale, **options)


ADAMW, ALPHAADAM = "AdamW", "AlphaAdam"
# asked for, because models of less than a million parameters don't get the fast kernels by themselves
FAST = {"fused": True}

VARIANTS = (
    Variant(ADAMW, AdamW, FAST, controlled=True),
    Variant(ALPHAADAM, AlphaAdam, FAST, controlled=True),
    Variant("AlphaAdam delayed", AlphaAdam, {**FAST, "sync": "delayed"}),
    Variant("AlphaAdam layer", AlphaAdam, {**FAST, "scope": "layer"}),
    Variant("AlphaAdam tau 0.05", AlphaAdam, {**FAST, "threshold": 0.05}),
    Variant("AlphaAdam tau 1/9", AlphaAdam, {**FAST, "threshold": 1 / 9}, controlled=True),
    Variant("AlphaAdam tau 0.2", AlphaAdam, {**FAST, "threshold": 0.2}),
    Variant("AlphaAdam gamma 0.1", AlphaAdam, {**FAST, "gamma": 0.1}),
    Variant("AlphaAdam gamma 0.5", AlphaAdam, {**FAST, "gamma": 0.5}),
    Variant("AlphaAdam warm-up", AlphaAdam, {**FAST, "warmup": 0.2}),
    Variant("constant alpha", baselines.ConstantAlpha, {"alpha": 2.0}),
    Variant("random mask", baselines.RandomMask, {}),
    Variant("C-AdamW", baselines.CAdamW, {}, controlled=True),
    Variant("MGUP", baselines.MGUPAdamW, {}),
    Variant("CMGUP", baselines.CMGUPAdamW, {}),
    Variant("Lion", baselines.Lion, {"betas": LION_BETAS}, lr_scale=0.5),
    Variant("AlphaLion", AlphaLion, {**FAST, "betas": LION_BETAS}, lr_scale=0.25),
)

BF16 = {"state_dtype": "bfloat16"}
PRECISIONS = tuple(
    Variant(f"{name}, beta2 {beta2}", kind, {**options, "betas": (0.9, beta2)}, bf16_parameters="parameters" in name)
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

BY_NAME = {variant.name: variant for variant in (*VARIANTS, *PRECISIONS)}
