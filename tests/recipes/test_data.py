"""Tokenizer and token blocks: trained once, cached, the same every time."""

from pathlib import Path

import pytest
from datasets import Dataset

from alphaadam_dist.training import data
from alphaadam_dist.training.corpus import Corpus
from alphaadam_dist.training.data import END_OF_TEXT, byte_level_bpe, collate, token_blocks


@pytest.fixture
def corpus() -> Corpus:
    train = [f"def f{i}(x):\n    return x + {i}\n" for i in range(50)]
    held_out = [f"def g{i}(y):\n    return y * {i}\n" for i in range(20)]
    return Corpus(Dataset.from_dict({"text": train}), Dataset.from_dict({"text": held_out}), "digest")


def test_the_tokenizer_is_deterministic(cache: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    byte_level_bpe(corpus, 300)
    monkeypatch.setenv("ALPHAADAM_CACHE", str(tmp_path / "other"))
    byte_level_bpe(corpus, 300)
    (first,), (second,) = cache.glob("bpe-*.json"), (tmp_path / "other").glob("bpe-*.json")
    assert first.read_bytes() == second.read_bytes()


def test_the_tokenizer_is_trained_once(cache: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    first = byte_level_bpe(corpus, 300)
    monkeypatch.delattr(data, "trainers")
    assert byte_level_bpe(corpus, 300).get_vocab() == first.get_vocab()


def test_any_bytes_survive_the_tokenizer(cache: Path, corpus: Corpus):
    tokenizer = byte_level_bpe(corpus, 300)
    text = "naïve 🙂\ttabs\r\n and   spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_blocks_are_the_text_in_order(cache: Path, corpus: Corpus):
    tokenizer = byte_level_bpe(corpus, 300)
    train, held_out = token_blocks(corpus, tokenizer, 16)
    assert {len(ids) for ids in train["input_ids"]} == {16}
    joined = tokenizer.decode([token for ids in train["input_ids"] for token in ids])
    assert "".join(text + END_OF_TEXT for text in corpus.train["text"]).startswith(joined)
    assert len(held_out) > 1


def test_blocks_are_cached_and_the_same(cache: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    tokenizer = byte_level_bpe(corpus, 300)
    first = [list(blocks["input_ids"]) for blocks in token_blocks(corpus, tokenizer, 16)]
    files = sorted(cache.iterdir())
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    assert [list(blocks["input_ids"]) for blocks in token_blocks(corpus, tokenizer, 16)] == first
    assert sorted(cache.iterdir()) == files


def test_the_held_out_sample_has_a_bounded_size(cache: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "_HELD_OUT_BLOCKS", 3)
    tokenizer = byte_level_bpe(corpus, 300)
    assert len(token_blocks(corpus, tokenizer, 8)[1]) == 3


def test_too_long_a_block_says_what_to_change(cache: Path, corpus: Corpus):
    tokenizer = byte_level_bpe(corpus, 300)
    with pytest.raises(ValueError, match=r"no training block of 100000 tokens.*smaller --block"):
        token_blocks(corpus, tokenizer, 100_000)


def test_collate_makes_each_token_a_label():
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["labels"].tolist() == batch["input_ids"].tolist()


def test_a_damaged_file_of_the_cache_is_made_again(cache: Path, corpus: Corpus):
    """Bits anywhere: pyarrow itself takes them, as other tokens or as the end of the process."""
    tokenizer = byte_level_bpe(corpus, 300)
    whole = [list(blocks["input_ids"]) for blocks in token_blocks(corpus, tokenizer, 16)]
    for path in (path for path in cache.iterdir() if path.is_file() and path.suffix != ".crc"):
        held = path.read_bytes()
        for at in range(0, len(held), len(held) // 12):
            damaged = bytearray(held)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            again = byte_level_bpe(corpus, 300)
            assert again.get_vocab() == tokenizer.get_vocab()
            assert [list(blocks["input_ids"]) for blocks in token_blocks(corpus, again, 16)] == whole
            assert path.read_bytes() == held or path.suffix == ".arrow"
