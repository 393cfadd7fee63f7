"""Defaults that depend on the model. No heavy import, so that the command line can show them at once."""

TINY = "tiny-llama"
STEPS = 240
BATCH = 8
# AdamW's best on the main job, and the default for both optimizers: benchmarks/main_job_lr_sweep.py finds it,
# benchmarks/results/ has the runs.
TINY_LR = 3e-3
FINE_TUNING_LR = 2e-5
TINY_BLOCK = 128
FINE_TUNING_BLOCK = 512


def default_lr(model: str) -> float:
    """The learning rate where none is given."""
    return TINY_LR if model == TINY else FINE_TUNING_LR


def default_block(model: str) -> int:
    """The number of tokens in a block where none is given."""
    return TINY_BLOCK if model == TINY else FINE_TUNING_BLOCK
