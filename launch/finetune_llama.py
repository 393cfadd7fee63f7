"""Fine-tune a causal language model on instructions. `python launch/finetune_llama.py --help` tells how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from alphaadam_dist.training.settings import LARGE, check_counts, check_path
from recipes.run import WHAT, Epochs, Lr, Out, Recipe, Training, WeightDecay, command, option


@dataclass(frozen=True, kw_only=True)
class FinetuneLlama(Recipe):
    """The options of this recipe."""

    model: Annotated[str, option("A Hugging Face id, a local folder, or a GGUF file.", WHAT)] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    data: Annotated[
        str,
        option(
            "Instructions: a JSONL file or Hugging Face id (or id:config) with messages, prompt and response, or "
            "instruction, input and output; or plain text, a file or folder.",
            WHAT,
        ),
    ] = "launch/data/garden/train.jsonl"
    held_out: Annotated[
        str | None, option("The same kind of data, to measure on.", WHAT, default="a part of --data")
    ] = None
    block: Annotated[int, option("Tokens in a row of a batch.", WHAT)] = 1024
    packing: Annotated[
        bool, option("Put several examples in a row; none sees another.", WHAT, "--packing/--no-packing")
    ] = True
    lora: Annotated[int | None, option("Train LoRA adapters of this rank only.", WHAT, default="train all weights")] = (
        None
    )
    lr: Lr = 2e-5
    weight_decay: WeightDecay = 0.0
    epochs: Epochs = 3
    out: Out = Path("runs/finetune-llama")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("model", self.model)
        check_path("data", self.data)
        if self.held_out is not None:
            check_path("held-out", self.held_out)
        if self.block < 2:
            raise ValueError(f"--block is {self.block}: predicting a next token takes 2 tokens or more")
        check_counts(self, {"block": 2, "lora": 1}, LARGE)


def main(settings: FinetuneLlama, training: Training) -> None:
    """Fine-tune a causal language model on instructions, learning the answers only.

    The tokenizer's chat template is used where it has one. Shows the held-out loss and sample answers before and after.

    [bold]Examples[/bold]

      launch/deepspeed.sh launch/finetune_llama.py --deepspeed ds_configs/zero3.json --model meta-llama/Llama-2-7b-hf
      --data databricks/databricks-dolly-15k --bf16 --gradient-checkpointing

      launch/torchrun.sh launch/finetune_llama.py --fsdp --lora 16 --lr 2e-4 --data my.jsonl

      python launch/finetune_llama.py --optimizer adamw
    """
    # Imported once the options are known to be good: transformers takes seconds.
    from transformers import set_seed

    from alphaadam_dist.training.data import collate
    from alphaadam_dist.training.models import pretrained_model, pretrained_tokenizer
    from recipes.answers import Answers, print_answers
    from recipes.instructions import blocks, load_instructions, with_chat_template
    from recipes.models import with_lora

    if not training.finished:
        arguments = training.arguments(lr_scheduler_type="cosine", adam_beta2=0.95)
        with arguments.main_process_first(desc="preparing the data"):
            tokenizer = with_chat_template(pretrained_tokenizer(settings.model))
            corpus = load_instructions(settings.data, settings.held_out)
            rows, held_out = (
                blocks(part, tokenizer, settings.block, settings.packing, training.say)
                for part in (corpus.train, corpus.held_out)
            )
        training.schedule(arguments, len(rows), warmup=0.1, evaluations=4)
        set_seed(settings.seed)
        base = pretrained_model(settings.model, training.weights_dtype(arguments))
        model = base if settings.lora is None else with_lora(base, settings.lora)
        answers = Answers(corpus.held_out, tokenizer, training.folder)
        training.train(arguments, model, rows, held_out, tokenizer, collate, callbacks=[answers])
    if training.first:
        print_answers(training.console, training.folder)
    training.report()


app = command(FinetuneLlama, main)

if __name__ == "__main__":
    app()
