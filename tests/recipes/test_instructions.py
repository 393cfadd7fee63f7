"""Instruction data: what is learned, what shares a row, and rows that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alphaadam_dist.torch_versions import numbers
from alphaadam_dist.training import transformers_versions
from alphaadam_dist.training.corpus import Corpus, load_corpus
from alphaadam_dist.training.data import END_OF_TEXT, byte_level_bpe, collate
from recipes.instructions import (
    IGNORED,
    blocks,
    encode_chat,
    join,
    load_instructions,
    pack,
    with_chat_template,
)
from tests.models import tiny_llama

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture
def tokenizer(cache: Path) -> PreTrainedTokenizerFast:
    texts = Dataset.from_dict({"text": ["Yes, one. No. Two? Be brief. user assistant" for _ in range(20)]})
    return byte_level_bpe(Corpus(texts, texts, "talk"), 300)


def _learned(example: dict[str, list[int]], tokenizer: PreTrainedTokenizerFast) -> str:
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, IGNORED)
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


def test_answers_are_learned_and_nothing_else(tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = CHATML
    example = encode_chat(TALK, tokenizer)
    assert tokenizer.decode(example["input_ids"]) == (
        "<|system|>Be brief.<|end|><|user|>One?<|end|><|assistant|>Yes, one.<|end|>"
        "<|user|>Two?<|end|><|assistant|>No.<|end|>"
    )
    assert _learned(example, tokenizer) == "Yes, one.<|end|>No.<|end|>"


def test_a_tokenizer_without_a_template_gets_one_that_ends_the_answer(tokenizer: PreTrainedTokenizerFast):
    example = encode_chat(TALK[1:3], with_chat_template(tokenizer))
    whole = f"{END_OF_TEXT}### User:\nOne?\n\n### Assistant:\nYes, one.{END_OF_TEXT}\n\n"
    assert tokenizer.decode(example["input_ids"]) == whole
    assert _learned(example, tokenizer) == f"Yes, one.{END_OF_TEXT}\n\n"
    prompt = tokenizer.apply_chat_template(TALK[1:2], tokenize=False, add_generation_prompt=True)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert example["input_ids"][: len(start)] == start, "asked as it was trained"


def test_a_template_that_rewrites_the_past_is_refused(tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier messages"):
        encode_chat(TALK, tokenizer)


def _example(first: int, size: int) -> dict[str, list[int]]:
    tokens = list(range(first, first + size))
    return {"input_ids": tokens, "labels": [IGNORED] * (size // 2) + tokens[size // 2 :]}


def test_each_example_goes_whole_into_the_first_row_with_room():
    sizes = [6, 5, 4, 7, 3, 8]
    packed = pack([_example(100 * i, size) for i, size in enumerate(sizes)], block=10)
    assert [[example["input_ids"][0] // 100 for example in row] for row in packed] == [[0, 2], [1, 4], [3], [5]]
    row = join(packed[0])
    assert row["input_ids"] == [0, 1, 2, 3, 4, 5, 200, 201, 202, 203]
    assert row["labels"] == [IGNORED] * 3 + [3, 4, 5] + [IGNORED] * 2 + [202, 203]
    assert row["position_ids"] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert [i for i, label in enumerate(join([_example(5, 1), _example(7, 1)])["labels"]) if label != IGNORED] == []


def _tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    # The Trainer turns the cache off too: with one, Transformers does not look for packed rows.
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_layer=2, n_embd=16, n_head=2, n_positions=32, use_cache=False))


def test_packing_is_refused_where_models_pass_over_its_borders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers_versions.transformers, "__version__", "4.48.3")
    with pytest.raises(ValueError, match=r"--packing needs Transformers 5, and this is 4\.48\.3.*--no-packing"):
        transformers_versions.refuse_packing()


packs = pytest.mark.skipif(numbers(transformers.__version__) < (5,), reason="packing is refused there")


@packs
@pytest.mark.parametrize("build", [tiny_llama, _tiny_gpt2], ids=["llama", "gpt2"])
def test_packed_examples_do_not_see_each_other(build: Any):
    """The loss of packed rows is that of the examples one by one, with padding too."""
    examples = [_example(1 + 5 * i, size) for i, size in enumerate((6, 5, 4, 7, 9))]
    model = build().eval()

    def total(rows: list[dict[str, list[int]]]) -> float:
        batch = collate(rows)
        learned = (batch["labels"][:, 1:] != IGNORED).sum()
        with torch.no_grad():
            return float(model(**batch).loss * learned)

    packed = [join(row) for row in pack(examples, block=16)]
    assert len(packed) < len(examples)
    assert len({len(row["input_ids"]) for row in packed}) > 1
    alone = sum(total([join([example])]) for example in examples)
    assert total(packed) == pytest.approx(alone, rel=1e-6)


@packs
def test_long_conversations_are_cut_and_long_texts_go_on(cache: Path, tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = CHATML
    said: list[str] = []
    long = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes, one. " * 40}]
    deaf = [{"role": "user", "content": "Two? " * 40}, {"role": "assistant", "content": "No."}]
    rows = Dataset.from_dict({"messages": [long, deaf, TALK[1:3]]})
    found = blocks(rows, tokenizer, 64, True, said.append)
    assert said == ["2 of 3 examples are longer than --block 64 tokens and are cut there."]
    assert [len(ids) for ids in found["input_ids"]] == [64, len(encode_chat(TALK[1:3], tokenizer)["input_ids"])]
    with pytest.raises(ValueError, match="--block is 4: no example has an answer within that many tokens"):
        blocks(rows, tokenizer, 4, True, said.append)

    text = "Yes, one. " * 40
    found = blocks(Dataset.from_dict({"text": [text]}), tokenizer, 64, True, said.append)
    assert tokenizer.decode([t for ids in found["input_ids"] for t in ids]) == text + END_OF_TEXT
    assert len(blocks(Dataset.from_dict({"messages": [TALK] * 3}), tokenizer, 300, False, said.append)) == 3
    assert len(blocks(Dataset.from_dict({"messages": [TALK] * 3}), tokenizer, 300, True, said.append)) == 1


def _jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Add: 1 and 2", "response": "3"},
        {"prompt": "Add: 1 and 2", "completion": "3"},
        {"instruction": "Add: 1 and 2", "input": "", "output": "3"},
        {"messages": [{"role": "user", "content": "Add: 1 and 2"}, {"role": "assistant", "content": "3"}]},
    ],
    ids=["response", "completion", "instruction", "messages"],
)
def test_every_shape_becomes_the_same_conversation(tmp_path: Path, row: dict[str, Any]):
    train, held_out = _jsonl(tmp_path / "a.jsonl", [row] * 3), _jsonl(tmp_path / "b.jsonl", [row])
    corpus = load_instructions(train, held_out)
    told = [{"role": "user", "content": "Add: 1 and 2"}, {"role": "assistant", "content": "3"}]
    assert corpus.train["messages"][:] == [told] * 3
    assert corpus.held_out["messages"][:] == [told]


def test_an_input_follows_its_instruction(tmp_path: Path):
    data = _jsonl(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 and 2", "output": "3"}] * 2)
    assert load_instructions(data).train["messages"][0][0]["content"] == "Add.\n\n1 and 2"


def test_a_part_is_held_out_where_no_file_is_given(tmp_path: Path):
    corpus = load_instructions(
        _jsonl(tmp_path / "a.jsonl", [{"prompt": f"{i}?", "response": "No."} for i in range(80)])
    )
    asked = [[messages[0]["content"] for messages in part["messages"]] for part in (corpus.train, corpus.held_out)]
    assert 1 <= len(asked[1]) <= 12
    assert sorted(asked[0] + asked[1]) == sorted(f"{i}?" for i in range(80))


def test_plain_text_may_have_a_held_out_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three")
    corpus = load_instructions(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    assert (corpus.train["text"][:], corpus.held_out["text"][:]) == (["one", "two"], ["three"])
    assert corpus.digest != load_corpus(str(tmp_path / "a.txt")).digest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": " "}],
            "row 2: what the assistant says is empty",
        ),
        ([{"instruction": "", "output": "b"}] * 2, "row 1: what the user says is empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 2, "row 1: the last message must be the assistant's"),
        ([{"messages": "hello"}] * 2, "row 1 has another shape than docs/recipes.md shows"),
        ([{"messages": ["hello"]}] * 2, "row 1 has another shape"),
        ([{"messages": [{"role": "assistant"}]}] * 2, "row 1 has another shape"),
        ([{"messages": [{"content": "a"}]}] * 2, "row 1 has another shape"),
        ([{"instruction": ["a"], "output": "b"}] * 2, "row 1 has another shape"),
        ([{"prompt": 1, "response": "b"}] * 2, "row 1: what the user says is empty"),
        ([{"text": "a"}, {"text": None}], "row 2: its text is None"),
        ([{"text": 1}] * 2, "row 1: its text is 1"),
        ([{"question": "a", "answer": "b"}] * 2, "has the columns answer, question: give messages, or prompt and"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: list[Any], message: str):
    data = _jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_instructions(data, data)


def test_wrong_files_are_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match=r"a\.jsonl is not JSON lines"):
        load_instructions(str(tmp_path / "a.jsonl"))
    chats = _jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "response": "b"}] * 2)
    with pytest.raises(ValueError, match="--held-out has text where --data has messages"):
        load_instructions(chats, _jsonl(tmp_path / "c.jsonl", [{"text": "a"}]))
