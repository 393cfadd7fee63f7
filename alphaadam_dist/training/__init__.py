"""`alphaadam train`, and what the recipes in `launch/` need too: data, models, logs, checkpoints and plots.

The training itself is the Hugging Face Trainer's.
"""
