"""From documents to blocks of tokens of one length, cached, so that a second run starts at once."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alphaadam_dist.files import size_and_checksum, write_whole
from alphaadam_dist.paths import cache_dir
from alphaadam_dist.training.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
# Enough tokens for a steady held-out loss, few enough that evaluating ten times costs little.
_HELD_OUT_BLOCKS = 128


def byte_level_bpe(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the corpus's training text, once; the same text always gives the same tokenizer."""
    path = cache_dir() / f"bpe-{corpus.digest}-{vocab_size}.json"
    if not _is_recorded(path):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus.train["text"], trainer)
        write_whole(path, tokenizer.to_str())
        _record(path)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def token_blocks(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block: int) -> tuple[Dataset, Dataset]:
    """The training text and a sample of the held-out text, as blocks of `block` tokens."""
    train = _pack(corpus.train, tokenizer, block, f"train-{corpus.digest}")
    held_out = _pack(corpus.held_out, tokenizer, block, f"heldout-{corpus.digest}")
    for name, blocks in (("training", train), ("held-out", held_out)):
        if len(blocks) == 0:
            raise ValueError(f"--data has no {name} block of {block} tokens: give more text, or a smaller --block")
    chosen = random.Random(0).sample(range(len(held_out)), min(_HELD_OUT_BLOCKS, len(held_out)))
    return train, held_out.select(sorted(chosen))


def _pack(documents: Dataset, tokenizer: PreTrainedTokenizerBase, block: int, name: str) -> Dataset:
    """Documents laid end to end, an end-of-text token between them, and cut into blocks; a short tail is dropped."""

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens: list[int] = []
        for ids in tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += [*ids, tokenizer.eos_token_id]
        return {"input_ids": [tokens[i : i + block] for i in range(0, len(tokens) - block + 1, block)]}

    return cached_map(documents, cut, f"{name}-{_digest(_vocabulary(tokenizer))}-{block}")


def fingerprint(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *more: str) -> str:
    """A name for what these rows become with this tokenizer."""
    return _digest(f"{rows._fingerprint}{_vocabulary(tokenizer)}{more}")


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(sorted(tokenizer.get_vocab().items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def cached_map(rows: Dataset, convert: Callable[[dict[str, list[Any]]], dict[str, list[Any]]], name: str) -> Dataset:
    """Convert the rows by batches into other columns, once: the result is kept in the cache under this name."""
    path = cache_dir() / f"{name}.arrow"
    recorded = _is_recorded(path)
    result = rows.map(
        convert,
        batched=True,
        remove_columns=rows.column_names,
        cache_file_name=str(path),
        load_from_cache_file=recorded,
        new_fingerprint=name,
    )
    if not recorded:
        _record(path)
    return result


def _record(path: Path) -> None:
    """Write size and checksum of a file of the cache beside it.

    What does not agree with them is made again: a damaged file gives other tokens, or ends the process that maps it.
    """
    write_whole(path.with_name(f"{path.name}.crc"), json.dumps(size_and_checksum(path)))


def _is_recorded(path: Path) -> bool:
    try:
        return json.loads(path.with_name(f"{path.name}.crc").read_bytes()) == size_and_checksum(path)
    except (OSError, ValueError):
        return False


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch for language modelling, padded at the right to its longest row; no padding where all have one length.

    Labels are the tokens where the rows have no labels of their own. Padding is not learned, and needs no attention
    mask: no token looks to its right.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {
        key: torch.tensor([row[key] + [filling] * (longest - len(row[key])) for row in rows], device="cpu")
        for key, filling in (("input_ids", 0), ("labels", -100), ("position_ids", 0))
        if key in rows[0]
    }
    return {"labels": padded["input_ids"], **padded}
