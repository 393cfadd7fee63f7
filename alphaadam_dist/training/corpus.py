"""Text to train on, and text held out: the standard library, local files, or a dataset of the Hugging Face hub.

The running interpreter's standard library is real text, prose and code, that every machine already has, so the main
job needs no download. Held-out documents are chosen by a hash of their names: the split is the same on every
machine and does not shift when a file is added.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset

STDLIB = "stdlib"
_HELD_OUT_ONE_IN = 20
# Installed packages are not the standard library, and tests and generated tables are poor reading.
_STDLIB_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data",
    "turtledemo", "ensurepip", "__phello__",
}  # fmt: skip
_JSON_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Corpus:
    """Two sets of documents, each with one column `text`, and a digest that names their content."""

    train: Dataset
    held_out: Dataset
    digest: str


def load_corpus(data: str) -> Corpus:
    """Load the text `data` names: `stdlib`, a local file or folder, or a dataset on the Hugging Face hub."""
    path = Path(data)
    if data == STDLIB:
        return _split(_standard_library())
    if path.is_dir():
        return _split(_folder(path))
    if path.suffix in _JSON_SUFFIXES and path.is_file():
        rows = load_dataset("json", data_files=data, split="train")
        return _split((str(i), text) for i, text in enumerate(rows[_text_column(rows, data)]))
    if path.is_file():
        # One file has no documents to hold out whole; paragraphs are the next best unit.
        return _split((str(i), text) for i, text in enumerate(path.read_text(errors="replace").split("\n\n")))
    return _from_hub(data)


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _STDLIB_SKIPPED.intersection(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _folder(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            text = path.read_bytes()
            if b"\0" not in text:
                yield name.as_posix(), text.decode("utf-8", errors="replace")


def _split(documents: Iterable[tuple[str, str]]) -> Corpus:
    train: list[str] = []
    held_out: list[str] = []
    content = hashlib.sha256()
    for name, text in documents:
        if not text.strip():
            continue
        content.update(f"{name}\0{text}\0".encode(errors="replace"))
        lot = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        (held_out if lot % _HELD_OUT_ONE_IN == 0 else train).append(text)
    if not held_out and len(train) > 1:
        held_out.append(train.pop())
    if not held_out:
        raise ValueError("--data has fewer than two documents: some must be held out; give a folder or a longer file")
    return Corpus(Dataset.from_dict({"text": train}), Dataset.from_dict({"text": held_out}), content.hexdigest()[:16])


def _from_hub(data: str) -> Corpus:
    name, _, config = data.partition(":")
    splits = load_dataset(name, config or None)
    if "train" not in splits:
        raise ValueError(f"--data {data} has no split named train, only {list(splits)}: choose a dataset with one")
    held_out_name = next((split for split in ("validation", "test") if split in splits), None)
    if held_out_name is None:
        parts = splits["train"].train_test_split(test_size=1 / _HELD_OUT_ONE_IN, seed=0)
        train, held_out = parts["train"], parts["test"]
    else:
        train, held_out = splits["train"], splits[held_out_name]
    column = _text_column(train, data)
    content = hashlib.sha256(f"{train._fingerprint}{held_out._fingerprint}".encode())
    return Corpus(_only_text(train, column), _only_text(held_out, column), content.hexdigest()[:16])


def _only_text(rows: Dataset, column: str) -> Dataset:
    return rows.select_columns([column]).rename_columns({column: "text"})


def _text_column(rows: Dataset, data: str) -> str:
    texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") == "string"]
    if not texts:
        raise ValueError(
            f"--data {data} has no column of text, only {list(rows.features)}: name the text column 'text'"
        )
    return "text" if "text" in texts else texts[0]
