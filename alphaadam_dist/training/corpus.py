"""Text to train on, and text held out: the standard library, local files, or a dataset of the Hugging Face hub.

The running interpreter's standard library is real text, prose and code, that every machine already has, so the main
job needs no download. Held-out documents are chosen by a hash of their names: the split is the same on every
machine and does not shift when a file is added.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, config, load_dataset

from alphaadam_dist.files import visible
from alphaadam_dist.training.text import STDLIB, is_text, standard_library

_HELD_OUT_ONE_IN = 20
_JSON_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Corpus:
    """Two sets of documents, each with one column (`text`, or `messages`), and a digest that names their content."""

    train: Dataset
    held_out: Dataset
    digest: str


def load_corpus(data: str, held_out: str | None = None) -> Corpus:
    """Load the text `data` names: `stdlib`, a local file or folder, or a dataset on the Hugging Face hub.

    `held_out` names text to hold out; without it some of `data` is.
    """
    if not (is_local_text(data) or _is_json(data)):
        train, rest = splits(data, held_out)
        return from_parts(_only_text(train, data), _only_text(rest, held_out or data))
    if held_out is None:
        return _split(data, _documents(data))
    return from_parts(*(Dataset.from_dict({"text": [t for _, t in _documents(d)]}) for d in (data, held_out)))


def is_local_text(data: str) -> bool:
    """Text without columns: the standard library, a folder, or a file that is not JSON."""
    return data == STDLIB or Path(data).is_dir() or (Path(data).is_file() and not _is_json(data))


def splits(data: str, held_out: str | None = None) -> tuple[Dataset, Dataset]:
    """The rows of a JSON lines file or a hub dataset (id or id:config), to train on and held out, all columns kept."""
    if held_out is not None:
        return _rows(data), _rows(held_out)
    if not _is_json(data):
        return _hub_splits(data)
    rows = _rows(data)
    chosen = [i for i in range(len(rows)) if _is_held_out(str(i))] or [len(rows) - 1]
    if len(rows) < 2:
        raise _too_few(data)
    return rows.select(sorted(set(range(len(rows))) - set(chosen))), rows.select(chosen)


def from_parts(train: Dataset, held_out: Dataset) -> Corpus:
    """A corpus of two datasets, which must have the same column."""
    if train.column_names != held_out.column_names:
        raise ValueError(
            f"--held-out has {', '.join(held_out.column_names)} where --data has {', '.join(train.column_names)}: "
            "give both the same kind of data"
        )
    content = hashlib.sha256(f"{train._fingerprint}{held_out._fingerprint}".encode())
    return Corpus(train, held_out, content.hexdigest()[:16])


def _is_json(data: str) -> bool:
    return Path(data).suffix in _JSON_SUFFIXES and Path(data).is_file()


def _rows(data: str) -> Dataset:
    if not _is_json(data):
        return _hub_splits(data)[0]
    with open(data, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                raise ValueError(f"--data {data}, line {number} is not UTF-8: save the file as UTF-8") from None
    return _load(data, "is not JSON lines, one object a line", "json", data_files=data, split="train")


def _load(data: str, wrong: str, *where: Any, **options: Any) -> Any:
    """What datasets finds there. Raises OSError where the system refused something, else ValueError."""
    try:
        return load_dataset(*where, **options)
    except Exception as error:  # a file of another shape fails in many ways, StopIteration among them
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, cause.filename or str(config.HF_DATASETS_CACHE)) from None
        raise ValueError(f"--data {data} {wrong}: {str(cause) or type(cause).__name__}") from None


def _documents(data: str) -> Iterator[tuple[str, str]]:
    path = Path(data)
    if data == STDLIB:
        yield from _standard_library()
    elif path.is_dir():
        yield from _folder(path)
    elif _is_json(data):
        rows = _rows(data)
        yield from ((str(i), text) for i, text in enumerate(_only_text(rows, data)["text"]))
    else:
        # One file has no documents to hold out whole; paragraphs are the next best unit.
        yield from ((str(i), text) for i, text in enumerate(path.read_text(errors="replace").split("\n\n")))


def _standard_library() -> Iterator[tuple[str, str]]:
    root, names = standard_library()
    for name in names:
        yield name, (root / name).read_text(encoding="utf-8", errors="replace")


def _folder(root: Path) -> Iterator[tuple[str, str]]:
    for name in visible(root):
        content = (root / name).read_bytes()
        if is_text(content):
            yield name, content.decode("utf-8", errors="replace")


def _too_few(data: str) -> ValueError:
    return ValueError(
        f"--data {data} has fewer than two documents: some must be held out; give a folder or a longer file"
    )


def _split(data: str, documents: Iterable[tuple[str, str]]) -> Corpus:
    train: list[str] = []
    held_out: list[str] = []
    content = hashlib.sha256()
    for name, text in documents:
        if not text.strip():
            continue
        content.update(f"{name}\0{text}\0".encode(errors="replace"))
        (held_out if _is_held_out(name) else train).append(text)
    if not held_out and len(train) > 1:
        held_out.append(train.pop())
    if not held_out:
        raise _too_few(data)
    return Corpus(Dataset.from_dict({"text": train}), Dataset.from_dict({"text": held_out}), content.hexdigest()[:16])


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _HELD_OUT_ONE_IN == 0


def _hub_splits(data: str) -> tuple[Dataset, Dataset]:
    name, _, part = data.partition(":")
    found = _load(data, "is no dataset that can be loaded from the hub", name, part or None)
    if "train" not in found:
        raise ValueError(f"--data {data} has no split named train, only {list(found)}: choose a dataset with one")
    held_out = next((split for split in ("validation", "test") if split in found), None)
    if held_out is not None:
        return found["train"], found[held_out]
    parts = found["train"].train_test_split(test_size=1 / _HELD_OUT_ONE_IN, seed=0)
    return parts["train"], parts["test"]


def _only_text(rows: Dataset, data: str) -> Dataset:
    column = _text_column(rows, data)
    return with_text(rows.select_columns([column]).rename_columns({column: "text"}), data)


def with_text(rows: Dataset, data: str) -> Dataset:
    """The rows, whose column `text` has a text in each. Raises ValueError, naming the row, where one has none."""
    if getattr(rows.features["text"], "dtype", "") not in ("string", "large_string") or rows.data["text"].null_count:
        for i, text in enumerate(rows["text"]):
            if not isinstance(text, str):
                raise ValueError(f"--data {data}, row {i + 1}: its text is {text!r}: give a text, or leave the row out")
    return rows


def _text_column(rows: Dataset, data: str) -> str:
    texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") == "string"]
    if not texts:
        raise ValueError(
            f"--data {data} has no column of text, only {list(rows.features)}: name the text column 'text'"
        )
    return "text" if "text" in texts else texts[0]
