"""What a model answers before and after fine-tuning."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alphaadam_dist.files import read_object, write_whole

FILE_NAME = "answers.json"
_REMOVE = "restore it, or start afresh with another --out"
_QUESTIONS = 3
_NEW_TOKENS = 80


class Answers(TrainerCallback):
    """Lets the model answer the first held-out questions when training begins and when it ends.

    All ranks generate together, greedily, since a sharded model runs on all of them at once. The first writes the file.
    """

    def __init__(self, held_out: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        chats = held_out["messages"][:_QUESTIONS] if "messages" in held_out.column_names else []
        self.prompts = [messages[:-1] for messages in chats]
        self.tokenizer, self.path = tokenizer, folder / FILE_NAME

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Answer, unless the run goes on from a checkpoint."""
        if state.global_step == 0:
            self._answer("before", kwargs["model"], state)
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Answer again."""
        self._answer("after", kwargs["model"], state)
        return control

    def _answer(self, when: str, model: Any, state: TrainerState) -> None:
        answers = [_generate(model, prompt, self.tokenizer) for prompt in self.prompts]
        if state.is_world_process_zero:
            written = read_object(self.path, _REMOVE) if self.path.exists() else {}
            questions = [prompt[-1]["content"] for prompt in self.prompts]
            write_whole(self.path, json.dumps({**written, "questions": questions, when: answers}, indent=2) + "\n")


def _generate(model: Any, prompt: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        written = model.generate(
            **tokens, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    model.train(training)
    return str(tokenizer.decode(written[0][tokens["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def print_answers(console: Console, folder: Path) -> None:
    """Show the questions with both answers, where there are any. Raises ValueError where the file is damaged."""
    path = folder / FILE_NAME
    told = read_object(path, _REMOVE)
    columns = [told.get(name) for name in ("questions", "before", "after")]
    if not all(isinstance(column, list) and len(column) == len(columns[0] or ()) for column in columns):
        raise ValueError(f"{path} lacks questions, or answers before or after: {_REMOVE}")
    for question, before, after in zip(*columns, strict=True):
        console.print(f"[bold]{escape(str(question))}[/bold]", highlight=False)
        console.print(f"[dim]before[/dim]  {escape(str(before))}", highlight=False)
        console.print(f"[dim]after [/dim]  {escape(str(after))}", highlight=False)
        console.print()
