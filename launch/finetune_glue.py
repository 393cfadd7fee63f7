"""Fine-tune an encoder on a GLUE task. `python launch/finetune_glue.py --help` tells how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from alphaadam_dist.training.settings import LARGE, check_counts, check_path
from recipes.run import WHAT, Epochs, Lr, Out, Recipe, Training, WeightDecay, command, option


@dataclass(frozen=True, kw_only=True)
class FinetuneGlue(Recipe):
    """The options of this recipe."""

    model: Annotated[str, option("An encoder: a Hugging Face id or a local folder.", WHAT)] = "roberta-base"
    task: Annotated[
        Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"],
        option("The GLUE task, or the one whose columns, labels and metrics your files have.", WHAT),
    ] = "mrpc"
    data: Annotated[
        Path | None, option("A CSV or TSV file with a header, to train on.", WHAT, default="GLUE's, from the hub")
    ] = None
    held_out: Annotated[
        Path | None, option("The same, to measure on.", WHAT, default="GLUE's validation set, from the hub")
    ] = None
    length: Annotated[int, option("Tokens at most; longer texts are cut.", WHAT)] = 128
    lr: Lr = 2e-5
    weight_decay: WeightDecay = 0.1
    epochs: Epochs = 3
    out: Out = Path("runs/finetune-glue")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("model", self.model)
        if self.length < 4:
            raise ValueError(f"--length is {self.length}: two texts and their marks take 4 tokens or more")
        check_counts(self, {"length": 4}, LARGE)


def main(settings: FinetuneGlue, training: Training) -> None:
    """Fine-tune an encoder on one of eight GLUE tasks, and measure it with the task's own metrics.

    Files have the hub's column names in their header: sentence (cola, sst2), sentence1 and sentence2 (mrpc, stsb, rte),
    question1 and question2 (qqp), premise and hypothesis (mnli), question and sentence (qnli), and label.

    [bold]Examples[/bold]

      launch/torchrun.sh launch/finetune_glue.py --task rte --epochs 10

      launch/deepspeed.sh launch/finetune_glue.py --deepspeed ds_configs/zero2.json --task mnli --batch 32 --bf16

      python launch/finetune_glue.py --task sst2 --data reviews.tsv --held-out more-reviews.tsv --optimizer adamw
    """
    # Imported once the options are known to be good: transformers takes seconds.
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

    from alphaadam_dist.training.models import naming_model, pretrained_tokenizer
    from alphaadam_dist.training.transformers_versions import in_dtype
    from recipes.glue import TASKS, load_task

    task = TASKS[settings.task]
    if not training.finished:
        arguments = training.arguments(lr_scheduler_type="linear", adam_beta2=0.98, adam_epsilon=1e-6)
        with arguments.main_process_first(desc="preparing the data"):
            tokenizer = pretrained_tokenizer(settings.model)

            def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
                texts = [batch[column] for column in task.columns]
                return {**tokenizer(*texts, truncation=True, max_length=settings.length), "labels": batch["label"]}

            rows, held_out = (
                part.map(encode, batched=True, remove_columns=part.column_names)
                for part in load_task(settings.task, settings.data, settings.held_out)
            )
        training.schedule(arguments, len(rows), warmup=0.06, evaluations=10)
        set_seed(settings.seed)
        with naming_model(settings.model):
            model = AutoModelForSequenceClassification.from_pretrained(
                settings.model, num_labels=len(task.labels) or 1, **in_dtype(training.weights_dtype(arguments))
            )
        collate = DataCollatorWithPadding(tokenizer)
        measures: dict[str, Any] = {"compute_loss": task.loss, "compute_metrics": task.compute}
        training.train(arguments, model, rows, held_out, tokenizer, collate, **measures)
    training.report(task.scores)


app = command(FinetuneGlue, main)

if __name__ == "__main__":
    app()
