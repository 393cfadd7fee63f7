"""Pre-train a GPT-2 from scratch. `python launch/pretrain_gpt2.py --help` tells how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from alphaadam_dist.training.settings import LARGE, check_counts, check_path
from recipes.run import WHAT, Epochs, Lr, Out, Recipe, Training, WeightDecay, command, option

MODEL = "The model"


@dataclass(frozen=True, kw_only=True)
class PretrainGpt2(Recipe):
    """The options of this recipe. The defaults are GPT-2's 124M."""

    data: Annotated[
        str,
        option(
            "A Hugging Face id (or id:config), a local file or folder of text, or stdlib, the source of Python's "
            "standard library.",
            WHAT,
        ),
    ] = "stdlib"
    tokenizer: Annotated[
        str | None,
        option("A Hugging Face id or local folder, such as gpt2.", MODEL, default="trained on the data"),
    ] = None
    vocabulary: Annotated[int, option("Tokens of a tokenizer that is trained here.", MODEL)] = 50257
    layers: Annotated[int, option("Transformer layers.", MODEL)] = 12
    hidden: Annotated[int, option("Width.", MODEL)] = 768
    heads: Annotated[int, option("Attention heads.", MODEL)] = 12
    block: Annotated[int, option("Tokens in a row of a batch, and the longest text the model takes.", MODEL)] = 1024
    lr: Lr = 6e-4
    weight_decay: WeightDecay = 0.1
    epochs: Epochs = 1
    out: Out = Path("runs/pretrain-gpt2")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("data", self.data)
        if self.tokenizer is not None:
            check_path("tokenizer", self.tokenizer)
        check_counts(self, {"layers": 1, "hidden": 1, "heads": 1}, LARGE)
        if self.hidden % self.heads:
            raise ValueError(f"--hidden is {self.hidden} with --heads {self.heads}: the heads must divide it")
        if self.block < 2:
            raise ValueError(f"--block is {self.block}: predicting a next token takes 2 tokens or more")
        if self.vocabulary < 257:
            raise ValueError(f"--vocabulary is {self.vocabulary}: 256 bytes and the end of a text take 257 or more")
        check_counts(self, {"block": 2, "vocabulary": 257}, LARGE)


def main(settings: PretrainGpt2, training: Training) -> None:
    """Pre-train a GPT-2 from scratch: 124M parameters, or as many as you say.

    [bold]Examples[/bold]

      launch/deepspeed.sh launch/pretrain_gpt2.py --deepspeed ds_configs/zero2.json --data Skylion007/openwebtext
      --tokenizer gpt2 --batch 12 --accumulate 5 --bf16

      launch/torchrun.sh launch/pretrain_gpt2.py --fsdp --data notes/ --steps 2000

      python launch/pretrain_gpt2.py --layers 2 --hidden 64 --heads 2 --block 64 --vocabulary 1024 --steps 20
    """
    # Imported once the options are known to be good: transformers takes seconds.
    from transformers import set_seed

    from alphaadam_dist.training.corpus import load_corpus
    from alphaadam_dist.training.data import byte_level_bpe, collate, token_blocks
    from alphaadam_dist.training.models import pretrained_tokenizer
    from recipes.models import gpt2

    if not training.finished:
        arguments = training.arguments(lr_scheduler_type="cosine", adam_beta2=0.95)
        with arguments.main_process_first(desc="preparing the data"):
            corpus = load_corpus(settings.data)
            tokenizer = (
                byte_level_bpe(corpus, settings.vocabulary)
                if settings.tokenizer is None
                else pretrained_tokenizer(settings.tokenizer)
            )
            rows, held_out = token_blocks(corpus, tokenizer, settings.block)
        training.schedule(arguments, len(rows), warmup=0.05, evaluations=10)
        set_seed(settings.seed)
        model = gpt2(
            tokenizer, layers=settings.layers, hidden=settings.hidden, heads=settings.heads, block=settings.block
        )
        if training.bf16_parameters:
            model = model.bfloat16()
        training.train(arguments, model, rows, held_out, tokenizer, collate)
    training.report()


app = command(PretrainGpt2, main)

if __name__ == "__main__":
    app()
