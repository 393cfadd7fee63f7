"""Instruction data: from JSON lines, a hub dataset or plain text to packed blocks whose labels are the answers only.

Blocks are `input_ids`, `labels` (-100 where nothing is to be learned) and `position_ids`. Positions start again at 0
with each example: Transformers sees from that where an example begins, and lets none attend to another.
"""

from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alphaadam_dist.training.corpus import Corpus, from_parts, is_local_text, load_corpus, splits, with_text
from alphaadam_dist.training.data import cached_map, fingerprint
from alphaadam_dist.training.transformers_versions import refuse_packing

IGNORED = -100
Row = dict[str, Any]
Example = dict[str, list[int]]

# For a tokenizer without a template. It is saved with the tokenizer, so that users ask the model as it was trained.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


def load_instructions(data: str, held_out: str | None = None) -> Corpus:
    """The examples `data` names, and those held out: one column, `messages`, or `text` for text without instructions.

    Args:
        data: JSON lines with `messages`, `prompt` and `response` (or `completion`), `instruction`, `input` and
            `output`, or `text`; a hub dataset with such columns (id or id:config); or what `load_corpus` takes.
        held_out: the same kind of data, to measure on; without it part of `data` is held out.

    Raises:
        ValueError: the columns are of another kind, or something is missing in a row, which the message names.
    """
    if is_local_text(data):
        return load_corpus(data, held_out)
    train, rest = splits(data, held_out)
    return from_parts(_conversations(train, data), _conversations(rest, held_out or data))


def _conversations(rows: Dataset, data: str) -> Dataset:
    has = set(rows.column_names)
    if "messages" in has:
        convert: Callable[[Row], list[Row]] = _own_messages
    elif {"instruction", "output"} <= has:
        convert = _from_instruction
    elif "prompt" in has and has & {"response", "completion"}:
        convert = _from_prompt
    elif "text" in has:
        return with_text(rows.select_columns(["text"]), data)
    else:
        raise ValueError(
            f"--data {data} has the columns {', '.join(sorted(has))}: give messages, or prompt and response, or "
            "instruction and output, or text"
        )

    def checked(row: Row, index: int) -> Row:
        try:
            messages = convert(row)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"--data {data}, row {index + 1} has another shape than docs/recipes.md shows ({error})"
            ) from None
        for message in messages:
            if not isinstance(message["content"], str) or not message["content"].strip():
                raise ValueError(f"--data {data}, row {index + 1}: what the {message['role']} says is empty")
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"--data {data}, row {index + 1}: the last message must be the assistant's")
        return {"messages": messages}

    return rows.map(checked, with_indices=True, remove_columns=rows.column_names)


def _own_messages(row: Row) -> list[Row]:
    return [{"role": message["role"], "content": message["content"]} for message in row["messages"] or []]


def _from_instruction(row: Row) -> list[Row]:
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _from_prompt(row: Row) -> list[Row]:
    answer = row.get("response") or row.get("completion")
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, with `CHAT_TEMPLATE` where it has none. It needs an end-of-sequence token."""
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token: set eos_token")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_chat(messages: list[Row], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokens and labels of a conversation. A label is -100, or a token of the assistant's, end mark included."""

    def rendered(upto: int, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages[:upto], tokenize=False, **options))

    text, answers = "", []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = rendered(i, add_generation_prompt=True)
            said = rendered(i + 1)
            if not asked.startswith(text) or not said.startswith(asked):
                raise ValueError(
                    f"the chat template of {tokenizer.name_or_path} rewrites earlier messages, so an answer's place "
                    "cannot be told: give one answer an example, or another tokenizer"
                )
            answers.append((len(asked), len(said)))
            text = said
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [any(start <= a and b <= end for start, end in answers) for a, b in encoded["offset_mapping"]]
    tokens = encoded["input_ids"]
    return {"input_ids": tokens, "labels": [t if yes else IGNORED for t, yes in zip(tokens, learned, strict=True)]}


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokens of a text and its end mark, all to be learned."""
    tokens = [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": tokens, "labels": tokens}


def blocks(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, block: int, packing: bool, say: Callable[[str], None]
) -> Dataset:
    """Encode the rows and lay them out in blocks of at most `block` tokens.

    A conversation longer than a block is cut, and dropped if nothing to learn is left; `say` is told how many. A longer
    text goes on in the next block.

    Args:
        packing: put several examples in a block, as they fit; otherwise each has a block of its own.

    Raises:
        ValueError: no example has anything to learn within a block, or packing is not for this version of Transformers.
    """
    if packing:
        refuse_packing()
    chats = "messages" in rows.column_names

    def encode(batch: Row) -> Row:
        encoded = (
            [encode_chat(m, tokenizer) for m in batch["messages"]]
            if chats
            else [encode_text(t, tokenizer) for t in batch["text"]]
        )
        return {key: [example[key] for example in encoded] for key in ("input_ids", "labels")}

    def lay_out(batch: Row) -> Row:
        pieces = []
        for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            for i in range(0, block if chats else len(tokens), block):
                piece = {"input_ids": tokens[i : i + block], "labels": labels[i : i + block]}
                if any(label != IGNORED for label in piece["labels"][1:]):
                    pieces.append(piece)
        laid = pack(pieces, block) if packing else [[piece] for piece in pieces]
        return {key: [joined[key] for joined in map(join, laid)] for key in ("input_ids", "labels", "position_ids")}

    name = fingerprint(rows, tokenizer, str(tokenizer.chat_template))
    encoded = cached_map(rows, encode, f"encoded-{name}")
    if chats:
        long = sum(len(tokens) > block for tokens in encoded["input_ids"])
        if long:
            say(f"{long} of {len(encoded)} examples are longer than --block {block} tokens and are cut there.")
    result = cached_map(encoded, lay_out, f"{'packed' if packing else 'single'}-{name}-{block}")
    if len(result) == 0:
        raise ValueError(f"--block is {block}: no example has an answer within that many tokens; give a larger --block")
    return result


def pack(examples: Iterable[Example], block: int) -> list[list[Example]]:
    """Distribute examples over blocks, each into the first block that has room for all of it."""
    packed: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example["input_ids"])
        place = next((i for i, left in enumerate(room) if left >= size), len(packed))
        if place == len(packed):
            packed.append([])
            room.append(block)
        packed[place].append(example)
        room[place] -= size
    return packed


def join(examples: list[Example]) -> Example:
    """One row of several examples. What follows from an example's end to the next one's start is not learned."""
    row: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORED, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row
