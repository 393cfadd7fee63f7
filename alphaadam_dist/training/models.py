"""The model to train: a small Llama built here, or any causal language model by hub id, local folder or GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from alphaadam_dist.training.reasons import is_of_communication
from alphaadam_dist.training.settings import TINY
from alphaadam_dist.training.transformers_versions import in_dtype, unpacked

_TINY_VOCABULARY = 2048


def load_tokenizer(model: str, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model; the small Llama's is trained on the corpus."""
    if model == TINY:
        return byte_level_bpe(corpus, _TINY_VOCABULARY)
    return pretrained_tokenizer(model)


def pretrained_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id, a local folder or a GGUF file."""
    folder, file = _place(model)
    with naming_model(model):
        return AutoTokenizer.from_pretrained(folder, **file)


def pretrained_model(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model by hub id, from a local folder or from a GGUF file, whose weights are unpacked.

    It is loaded in `dtype`, whatever it was saved in: DeepSpeed trains in the type it is given.
    """
    folder, file = _place(model)
    more = {**unpacked(), **file} if file else {}
    with naming_model(model):
        return AutoModelForCausalLM.from_pretrained(folder, **in_dtype(dtype), **more)


@contextmanager
def naming_model(model: str) -> Iterator[None]:
    """Turn an error that damaged or foreign files of a model cause into a ValueError that names the model.

    Errors of the system or of other ranks stay as they are.
    """
    try:
        yield
    except Exception as error:
        of_the_machine = isinstance(error, RuntimeError) and type(error) is not RuntimeError  # out of memory, say
        if isinstance(error, OSError) or of_the_machine or is_of_communication(error):
            raise
        raise ValueError(
            f"--model {model} cannot be loaded ({type(error).__name__}: {error}): its files are damaged or of another "
            "kind of model; give another"
        ) from error


def _place(model: str) -> tuple[str, dict[str, str]]:
    """What from_pretrained takes for a model: the folder or id, and for a GGUF file its name there."""
    path = Path(model)
    if path.suffix != ".gguf":
        return model, {}
    if not path.is_file():
        raise ValueError(f"--model is {model}: there is no such GGUF file; check the path")
    return str(path.parent), {"gguf_file": path.name}


def load_model(model: str, tokenizer: PreTrainedTokenizerBase, block: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself: pretrained, or for the small Llama with random weights from the current seed."""
    if model != TINY:
        return pretrained_model(model, dtype)
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
