"""The text of the training tasks: held out by whole documents, and many of them. Loaded once a process."""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alphaadam_dist.training.corpus import Corpus, load_corpus
from alphaadam_dist.training.data import byte_level_bpe, token_blocks

ONE_IN = 5
"""A document in so many is held out."""
BLOCKS, PIECES = 4, 16
"""As many blocks, or pieces for the encoder, are of one held-out document at most: none is most of the set."""
PACKAGES = ("asyncio", "ctypes", "email", "importlib", "multiprocessing", "tkinter", "unittest", "xml")
SHORTEST = 500
"""Characters of documentation of which a file becomes a document."""


@dataclass(frozen=True)
class Data:
    """Rows to train on and held-out rows. ``document`` says which document each held-out row is of, int64 (n,).

    ``train`` and ``held_out`` are tuples of tensors with one row an example: tokens, and labels where there are any.
    """

    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    document: Tensor


@functools.cache
def language(data: str, vocabulary: int, block: int) -> Data:
    """Blocks of shape (n, block) of a corpus, by a byte-level BPE of its training text."""
    return _blocks(corpus(data), bpe(data, vocabulary), block)


@functools.cache
def documentation(data: str, tokenizer: PreTrainedTokenizerBase, block: int) -> Data:
    """The same of the docstrings of the corpus, a document a file; those of held-out files are held out."""
    whole = corpus(data)
    train, held_out = (
        [text for text in map(docstrings, part["text"]) if len(text) >= SHORTEST] for part in _parts(whole)
    )
    return _blocks(_corpus(train, held_out, f"{whole.digest}-docstrings"), tokenizer, block)


@functools.cache
def packages(data: str, vocabulary: int, length: int) -> Data:
    """Pieces of ``length`` tokens from eight packages of the standard library, labels 0 to 7; files held out whole."""
    tokenizer = bpe(data, vocabulary)
    train, held_out = [], []
    for label, package in enumerate(PACKAGES):
        files = sorted(Path(get_path("stdlib"), package).rglob("*.py"), key=lambda file: _chance(file.name))
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if "test" not in file.parts]
        pieces = [rows for rows in (_rows(tokenizer, text, length) for text in texts) if len(rows)]
        first = len(pieces) // 4
        held_out += [(_spread(rows, PIECES), label) for rows in pieces[:first]]
        train += [(rows, label) for rows in pieces[first:]]
    return _labelled(train, held_out)


@functools.cache
def sentences(folder: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Data:
    """GLUE's SST-2 and what is written like it: train.tsv and held_out.tsv (or dev.tsv), columns sentence and label.

    Sentences are cut and padded to ``length`` tokens; each held-out one is a document.
    """
    read = functools.partial(_sentences, tokenizer=tokenizer, length=length)
    held_out = next(path for path in (Path(folder, "held_out.tsv"), Path(folder, "dev.tsv")) if path.exists())
    return _labelled(read(Path(folder, "train.tsv")), read(held_out))


def _sentences(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[tuple[Tensor, int]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = [row["sentence"] for row in rows]
    ids = tokenizer(texts, truncation=True, padding="max_length", max_length=length, return_tensors="pt")["input_ids"]
    return [(one[None], int(row["label"])) for one, row in zip(ids, rows, strict=True)]


def _labelled(train: list[tuple[Tensor, int]], held_out: list[tuple[Tensor, int]]) -> Data:
    (tokens, labels, _), (held, held_labels, document) = _joined(train), _joined(held_out)
    return Data((tokens, labels), (held, held_labels), document)


def _joined(parts: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, labels and document of each part with its label."""
    sizes = torch.tensor([len(rows) for rows, _ in parts])
    labels = torch.tensor([label for _, label in parts])
    return torch.cat([rows for rows, _ in parts]), labels.repeat_interleave(sizes), _documents(sizes)


def _documents(sizes: Tensor) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(sizes)


# ---- documents ----------------------------------------------------------------------------------------------------


@functools.cache
def corpus(data: str) -> Corpus:
    """The corpus with one document in five held out, chosen by its text: the usual one in twenty are too few."""
    usual = load_corpus(data)
    texts = [text for part in _parts(usual) for text in part["text"]]
    held_out = [text for text in texts if _chance(text) % ONE_IN == 0]
    return _corpus([text for text in texts if _chance(text) % ONE_IN], held_out, f"{usual.digest}-{ONE_IN}")


@functools.cache
def bpe(data: str, vocabulary: int) -> PreTrainedTokenizerBase:
    return byte_level_bpe(corpus(data), vocabulary)


def docstrings(source: str) -> str:
    """The docstrings of a file in the order of its syntax tree; none where it is no Python that this version reads."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def _parts(whole: Corpus) -> tuple[Dataset, Dataset]:
    return whole.train, whole.held_out


def _corpus(train: list[str], held_out: list[str], digest: str) -> Corpus:
    return Corpus(Dataset.from_dict({"text": train}), Dataset.from_dict({"text": held_out}), digest)


def _chance(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:4], "big")


# ---- blocks -------------------------------------------------------------------------------------------------------


def _blocks(whole: Corpus, tokenizer: PreTrainedTokenizerBase, block: int) -> Data:
    train, _ = token_blocks(whole, tokenizer, block)
    rows: Iterable[Tensor] = (_spread(_rows(tokenizer, text, block), BLOCKS) for text in whole.held_out["text"])
    held_out = [of_one for of_one in rows if len(of_one)]
    sizes = torch.tensor([len(of_one) for of_one in held_out])
    return Data((train.with_format("torch")["input_ids"][:],), (torch.cat(held_out),), _documents(sizes))


def _rows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """A document as rows of ``length`` tokens; a short tail is dropped."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)


def _spread(rows: Tensor, most: int) -> Tensor:
    """``most`` of the rows at equal distances, or all where they are fewer."""
    return rows[torch.arange(most) * len(rows) // most] if len(rows) > most else rows
