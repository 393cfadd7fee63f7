"""The Trainer of the main job."""

from typing import Any

from torch.utils.data import RandomSampler
from transformers import Trainer


class WholeBatches(Trainer):
    """A Trainer whose epochs are whole batches of all ranks together: the same blocks on any number of ranks.

    Left to itself the Trainer makes a smaller step of what is left at an epoch's end where it accumulates gradients,
    and drops it where it does not.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        whole = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if len(dataset) < whole:
            raise ValueError(
                f"--data has {len(dataset)} blocks, a step takes {whole}: give more text or a smaller --batch"
            )
        return RandomSampler(dataset, num_samples=len(dataset) // whole * whole)
