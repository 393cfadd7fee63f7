"""Axolotl: ``plugins: [alphaadam_dist.integrations.axolotl_plugin.AlphaAdamPlugin]`` and ``optimizer: alphaadam``.

Axolotl hands ``optimizer`` and ``optim_args`` on to HF's Trainer.
"""

from axolotl.integrations.base import BasePlugin


class AlphaAdamPlugin(BasePlugin):
    """Nothing but its import, which is alphaadam_dist's too, before the training arguments are made."""
