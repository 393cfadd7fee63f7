"""The model to train: a small Llama built here, or any causal language model by hub id or local path."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alphaadam_dist.training.corpus import Corpus
from alphaadam_dist.training.data import byte_level_bpe
from alphaadam_dist.training.presets import TINY

_TINY_VOCABULARY = 2048


def load_tokenizer(model: str, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model; the small Llama's is trained on the corpus."""
    if model == TINY:
        return byte_level_bpe(corpus, _TINY_VOCABULARY)
    return AutoTokenizer.from_pretrained(model)


def load_model(model: str, tokenizer: PreTrainedTokenizerBase, block: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, with random weights from the current seed for the small Llama.

    A pretrained model is loaded in `dtype`, whatever it was saved in: DeepSpeed trains in the type it is given.
    """
    if model != TINY:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=max(block, 256),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
