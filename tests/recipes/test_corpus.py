"""The text to train on: the same everywhere, and never mixed with what is held out."""

import json
from pathlib import Path

import pytest

from alphaadam_dist.training.corpus import Corpus, load_corpus


def _texts(corpus: Corpus) -> tuple[list[str], list[str]]:
    return list(corpus.train["text"]), list(corpus.held_out["text"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(60):
        (tmp_path / f"note{i}.txt").write_text(f"note number {i}")
    return tmp_path


def test_the_standard_library_is_deterministic_and_its_split_disjoint():
    corpus = load_corpus("stdlib")
    train, held_out = _texts(corpus)
    again = load_corpus("stdlib")
    assert (train, held_out) == _texts(again)
    assert corpus.digest == again.digest
    assert not set(train) & set(held_out)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1
    assert sum(map(len, train)) > 3_000_000


def test_a_new_file_does_not_move_the_others_between_the_sets(folder: Path):
    train, held_out = _texts(load_corpus(str(folder)))
    (folder / "later.txt").write_text("written later")
    train_then, held_out_then = _texts(load_corpus(str(folder)))
    assert set(train) <= set(train_then)
    assert set(held_out) <= set(held_out_then)
    assert len(train_then) + len(held_out_then) == 61


def test_the_digest_follows_the_content(folder: Path):
    before = load_corpus(str(folder)).digest
    (folder / "note0.txt").write_text("changed")
    assert load_corpus(str(folder)).digest != before


def test_hidden_and_binary_files_are_left_out(folder: Path):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "picture.bin").write_bytes(b"\x00\x01binary")
    train, held_out = _texts(load_corpus(str(folder)))
    assert len(train) + len(held_out) == 60


def test_jsonl_and_a_single_text_file(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": i, "text": f"row {i}"}) + "\n" for i in range(60)))
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(f"row {i}" for i in range(60)))
    for path in (rows, text):
        train, held_out = _texts(load_corpus(str(path)))
        assert sorted(train + held_out) == sorted(f"row {i}" for i in range(60))
        assert train
        assert held_out


def test_too_little_text_says_what_to_give(tmp_path: Path):
    (tmp_path / "only.txt").write_text("one document")
    with pytest.raises(ValueError, match=r"fewer than two documents.*give a folder or a longer file"):
        load_corpus(str(tmp_path))


WRONG_ROWS = {
    "empty": (b"", "is not JSON lines"),
    "blank": (b"\n\n", "is not JSON lines"),
    "cut short": (b'{"text": "a"}\n{"text": "b', "is not JSON lines"),
    "numbers": (b"1\n2\n", "is not JSON lines"),
    "binary": (bytes(range(1, 128)) * 4, "is not JSON lines"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8: save the file as UTF-8"),
    "one row": (b'{"text": "a"}\n', "has fewer than two documents"),
    "no text": (b'{"id": 1}\n' * 3, "has no column of text"),
    "a row without text": (b'{"text": "a"}\n{"text": null}\n{"text": "c"}\n', "row 2: its text is None"),
    "a row of other columns": (b'{"text": "a"}\n{"other": "b"}\n{"text": "c"}\n', "row 2: its text is None"),
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_a_file_of_another_shape_is_named(tmp_path: Path, wrong: str):
    held, message = WRONG_ROWS[wrong]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(held)
    with pytest.raises(ValueError, match=rf"--data {path}\b.*{message}"):
        load_corpus(str(path))
