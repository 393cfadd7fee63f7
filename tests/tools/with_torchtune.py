"""What torchtune's config names beside the optimizer: a tiny Llama, its tokenizer, and a note of every alpha."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchtune import training
from torchtune.models.llama2 import llama2
from torchtune.modules import TransformerDecoder
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

from alphaadam_dist import AlphaAdam

# The recipe calls these always, and each fails on a CPU.
for name in ("get_memory_stats", "log_memory_stats", "cleanup_before_training"):
    setattr(training, name, lambda *_, **__: None)


def llama(out: str) -> TransformerDecoder:
    """The model of conftest.py. From now on alpha of each step is written to ``out``: torchtune logs none."""
    alphas: list[float] = []

    def keep(optimizer: Optimizer, *_: Any) -> None:
        assert isinstance(optimizer, AlphaAdam)
        alphas.append(optimizer.alpha)
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(alphas))

    register_optimizer_step_post_hook(keep)
    return llama2(vocab_size=384, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=256,
                  intermediate_dim=56, norm_eps=1e-6)  # fmt: skip


class Words(HuggingFaceBaseTokenizer):
    """A tokenizer as text_completion_dataset and the recipe's collator want it."""

    max_seq_len = None
    pad_id = 0

    def __init__(self, folder: str) -> None:
        super().__init__(f"{folder}/tokenizer.json", tokenizer_config_json_path=f"{folder}/tokenizer_config.json")
