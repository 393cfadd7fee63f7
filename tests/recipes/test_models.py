"""Models from local files that are damaged or of another kind are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from alphaadam_dist.training.corpus import Corpus
from alphaadam_dist.training.data import byte_level_bpe
from alphaadam_dist.training.models import pretrained_model, pretrained_tokenizer

DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights cut short": ("model.safetensors", lambda path: os.truncate(path, 500)),
    "weights empty": ("model.safetensors", lambda path: os.truncate(path, 0)),
    "no weights": ("model.safetensors", Path.unlink),
    "config cut short": ("config.json", lambda path: os.truncate(path, 40)),
    "config a list": ("config.json", lambda path: path.write_text("[1]")),
    "config of another kind": ("config.json", lambda path: path.write_text('{"model_type": "vit"}')),
    "config of another size": (
        "config.json",
        lambda path: path.write_text(path.read_text().replace('"hidden_size": 8', '"hidden_size": 12')),
    ),
    "tokenizer cut short": ("tokenizer.json", lambda path: os.truncate(path, 500)),
    "tokenizer a list": ("tokenizer.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_loaded_is_named(cache: Path, tmp_path: Path, damage: str) -> None:
    texts = Dataset.from_dict({"text": ["a b c"] * 9})
    config = LlamaConfig(vocab_size=61, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    for part in (byte_level_bpe(Corpus(texts, texts, "letters"), 300), LlamaForCausalLM(config)):
        part.save_pretrained(tmp_path / "model")
    name, act = DAMAGES[damage]
    act(tmp_path / "model" / name)
    load = pretrained_tokenizer if name.startswith("tokenizer") else partial(pretrained_model, dtype=torch.float32)
    with pytest.raises((ValueError, OSError), match=str(tmp_path / "model")):
        load(str(tmp_path / "model"))
