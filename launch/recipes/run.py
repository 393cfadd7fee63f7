"""A run of a recipe with one optimizer: its options, its command line, and the training from start to report.

Any launcher starts a recipe, once on every rank, like a script of Hugging Face's. It trains with one optimizer and
writes to OUT/OPTIMIZER. Started again with another optimizer and the same OUT, it shows the results of both.
"""

import inspect
import math
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import torch.distributed as dist
import typer
from rich.console import Console

from alphaadam_dist.training import compilations, leftovers, metrics, reasons
from alphaadam_dist.training.rank import leave, sigterm_asks
from alphaadam_dist.training.run_folder import PICTURE_NAME, open_optimizer_folder
from alphaadam_dist.training.settings import (
    LARGE,
    MANY,
    OPTIMIZERS,
    SavedSettings,
    check_counts,
    check_groups,
    check_rates,
    check_seed,
)
from alphaadam_dist.training.start_ranks import SIGTERM_CODE, Stopped, free_port
from alphaadam_dist.training.tie import end, tie
from alphaadam_dist.verify.rendezvous import environment

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback, TrainingArguments

_FINISHED = "finished"
WHAT, HOW, RUN = "What to train", "How to run it", "Results"
_NOT_COMPARED = ("optimizer", "out", "resume", "local_rank", "save_every")  # runs that differ in these can be compared


def option(help: str, panel: str, *names: str, default: str | None = None, hidden: bool = False) -> Any:
    """A typer option. `default` describes in the help a default that depends on something; None shows the value."""
    text = help if default is None else f"{help} Default: {default}."
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=default is None, hidden=hidden)


Lr = Annotated[float, option("Peak learning rate.", WHAT)]
WeightDecay = Annotated[float, option("Decoupled weight decay.", WHAT)]
Epochs = Annotated[float, option("Passes over the training data.", WHAT)]
Out = Annotated[Path, option("Folder for the results, which all nodes must see.", RUN)]


@dataclass(frozen=True, kw_only=True)
class Recipe(SavedSettings):
    """The options of every recipe. Each recipe adds its own, and its own defaults."""

    optimizer: Annotated[
        Literal["alphaadam", "lookahead", "adamw"],
        option("Run the recipe once with each and the same --out: the later ones show all.", WHAT),
    ] = "alphaadam"
    lr: Lr
    weight_decay: WeightDecay
    epochs: Epochs
    groups: Annotated[
        Path | None,
        option(
            "A JSON file with groups of parameters by name that have a rate, decay or betas of their own.",
            WHAT,
            default="norms and biases do not decay, or what --deepspeed says",
        ),
    ] = None
    steps: Annotated[int | None, option("Optimizer steps, instead of --epochs.", WHAT, default="as --epochs says")] = (
        None
    )
    batch: Annotated[int, option("Rows of the data in a batch, on each rank.", WHAT)] = 8
    accumulate: Annotated[int, option("Batches in an optimizer step.", WHAT)] = 1
    seed: Annotated[int, option("Seed of new weights and of the data's order.", WHAT)] = 0
    deepspeed: Annotated[
        Path | None,
        option("A DeepSpeed config, such as ds_configs/zero2.json.", HOW, default="no DeepSpeed"),
    ] = None
    fsdp: Annotated[bool, option("Shard with PyTorch's FSDP2.", HOW, "--fsdp")] = False
    bf16: Annotated[
        bool | None,
        option("Compute in bfloat16.", HOW, "--bf16/--no-bf16", default="where the GPU has it"),
    ] = None
    state_dtype: Annotated[
        Literal["bfloat16"] | None,
        option("Keep AlphaAdam's moments in it, rounded stochastically.", HOW, default="that of the weights"),
    ] = None
    bf16_parameters: Annotated[
        bool, option("Train AlphaAdam's weights in bf16, without fp32 masters.", HOW, "--bf16-parameters")
    ] = False
    gradient_checkpointing: Annotated[
        bool, option("Compute activations twice to keep fewer.", HOW, "--gradient-checkpointing")
    ] = False
    out: Out
    resume: Annotated[bool, option("Go on from the last checkpoint in --out.", RUN, "--resume")] = False
    save_every: Annotated[int, option("Steps between checkpoints; the last step has one anyway.", RUN)] = 500
    # DeepSpeed's launcher adds it. The environment says the same.
    local_rank: Annotated[int, option("", HOW, "--local_rank", "--local-rank", hidden=True)] = 0

    def __post_init__(self) -> None:
        check_rates(self, ("lr", "epochs"))
        if self.epochs > MANY:
            raise ValueError(f"--epochs is {self.epochs}: it must be {MANY:,} or less")
        check_counts(self, {"steps": 1, "save_every": 1})
        check_counts(self, {"batch": 1, "accumulate": 1}, LARGE)
        check_seed(self.seed)
        check_groups(self.groups)
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay is {self.weight_decay}: it must be 0 or more, and finite")
        if self.fsdp and self.deepspeed is not None:
            raise ValueError(f"--fsdp with --deepspeed {self.deepspeed}: one of them shards the model, so give one")
        if self.bf16_parameters and self.state_dtype is None:
            raise ValueError(
                "--bf16-parameters without --state-dtype bfloat16: weights in bf16 that are rounded to nearest stand "
                "still at small rates, so give both"
            )
        if self.deepspeed is not None and not self.deepspeed.is_file():
            raise ValueError(f"--deepspeed is {self.deepspeed}: there is no such file; ds_configs/ has some")

    def saved(self) -> dict[str, Any]:
        """What must be equal for optimizers to be compared, the number of ranks included."""
        kept = {name: value for name, value in asdict(self).items() if name not in _NOT_COMPARED}
        kept = {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
        return kept | {"ranks": int(os.environ.get("WORLD_SIZE", "1"))}


@dataclass(frozen=True)
class Training:
    """One rank's training with one optimizer."""

    recipe: Recipe
    console: Console
    first: bool
    asked_to_stop: Event

    @property
    def folder(self) -> Path:
        """Where this optimizer's results go."""
        return self.recipe.out / self.recipe.optimizer

    @property
    def optimizer(self) -> str:
        """The optimizer's name."""
        return OPTIMIZERS[self.recipe.optimizer]

    @property
    def state_dtype(self) -> str | None:
        """Of AlphaAdam's moments, with look-ahead too; AdamW has no such option and trains as ever."""
        return self.recipe.state_dtype if self.recipe.optimizer != "adamw" else None

    @property
    def bf16_parameters(self) -> bool:
        """Whether the weights themselves are in bf16, without masters."""
        return self.recipe.bf16_parameters and self.state_dtype is not None

    def weights_dtype(self, arguments: "TrainingArguments") -> "torch.dtype":
        """The type to load weights in."""
        import torch

        from alphaadam_dist.training.trainer import weights_dtype

        return torch.bfloat16 if self.bf16_parameters else weights_dtype(arguments)

    @cached_property
    def groups(self) -> list[dict[str, Any]] | None:
        """The entries in --groups."""
        from alphaadam_dist.groups import read_file

        return None if self.recipe.groups is None else read_file(self.recipe.groups)

    @property
    def finished(self) -> bool:
        """Whether it has trained to the end already, and only the report is left."""
        return self.recipe.resume and (self.folder / _FINISHED).exists()

    def arguments(self, **options: Any) -> "TrainingArguments":
        """The Trainer's arguments for these options. Make them before data and model."""
        import datasets
        import transformers

        from alphaadam_dist.training.ds_config import in_bf16, naming_config, read_ds_config
        from alphaadam_dist.training.trainer import training_arguments

        if not (self.first and self.console.is_terminal):
            datasets.disable_progress_bars()
            transformers.utils.logging.disable_progress_bar()
        recipe, ds_config = self.recipe, None
        with naming_config(recipe.deepspeed):
            if recipe.deepspeed is not None:
                ds_config = read_ds_config(recipe.deepspeed, self.optimizer, self.groups)
                if self.state_dtype is not None:
                    ds_config = in_bf16(ds_config, parameters=self.bf16_parameters)
            # Accelerate would make fp32 weights of those that it is to cast to bf16
            cast = recipe.bf16 if not self.bf16_parameters else ds_config is not None
            return training_arguments(
                self.folder,
                ds_config=ds_config,
                shard_fsdp=recipe.fsdp,
                bf16=cast,
                per_device_train_batch_size=recipe.batch,
                per_device_eval_batch_size=recipe.batch,
                gradient_accumulation_steps=recipe.accumulate,
                activation_checkpointing=recipe.gradient_checkpointing,
                learning_rate=recipe.lr,
                weight_decay=recipe.weight_decay,
                seed=recipe.seed,
                save_steps=recipe.save_every,
                eval_on_start=True,
                # The rows have what the model takes and nothing else, and every parameter gets a gradient.
                remove_unused_columns=False,
                ddp_find_unused_parameters=False,
                **options,
            )

    def schedule(self, arguments: "TrainingArguments", rows: int, warmup: float, evaluations: int) -> None:
        """Set the number of steps for this many rows of training data, and what follows from it.

        Args:
            warmup: share of the steps over which the learning rate rises.
            evaluations: how often to measure on the held-out data during the training; at least every 500 steps.
        """
        in_a_step = self.recipe.batch * self.recipe.accumulate * arguments.world_size
        steps = self.recipe.steps or math.ceil(self.recipe.epochs * rows / in_a_step)
        arguments.max_steps = steps
        arguments.warmup_steps = max(1, round(warmup * steps))
        arguments.logging_steps = min(max(1, steps // 60), 10)
        arguments.eval_steps = min(math.ceil(steps / evaluations), 500)

    def say(self, text: str) -> None:
        """Print it, once for all ranks."""
        if self.first:
            self.console.print(text, highlight=False, soft_wrap=True)

    def train(self, *what: Any, callbacks: Sequence["TrainerCallback"] = (), **options: Any) -> None:
        """Call `trainer.fit` for this optimizer, with these arguments, and show the progress.

        Raises Stopped where any rank was asked to stop; the step it had reached is saved.
        """
        from alphaadam_dist.training.callbacks import SaveAndStop
        from alphaadam_dist.training.ds_config import naming_config
        from alphaadam_dist.training.trainer import fit

        callbacks = [SaveAndStop(self.asked_to_stop), *callbacks]
        with naming_config(self.recipe.deepspeed):
            finished = fit(
                self.optimizer, *what, console=self.console, callbacks=callbacks, state_dtype=self.state_dtype,
                groups=self.groups, **options,
            )  # fmt: skip
        if not finished:
            raise Stopped(saved=True)
        if self.first:
            (self.folder / _FINISHED).touch()

    def report(self, scores: Sequence[str] = ()) -> None:
        """Show the results, beside those of the other optimizers that have been trained too.

        Args:
            scores: the evaluation's metrics to show in a table; without them the table shows the losses.
        """
        if not self.first:
            return
        from alphaadam_dist.training.plots import plot_run
        from alphaadam_dist.training.summary import print_losses, print_scores

        out, logs = self.recipe.out, self.logs()
        if self.optimizer not in logs:
            raise ValueError(
                f"{self.folder / metrics.FILE_NAME} has no losses of the training that finished there: restore it, or "
                "start afresh with another --out"
            )
        self.console.print()
        if scores:
            print_scores(self.console, logs, scores)
        else:
            print_losses(self.console, logs)
        others = [key for key, name in OPTIMIZERS.items() if name not in logs]
        if others:
            named = " or ".join(OPTIMIZERS[key] for key in others)
            self.say(f"The same command with --optimizer {' or '.join(others)} puts {named} beside it.")
        self.console.rule("files")
        if "AlphaAdam" in logs:
            picture = out / PICTURE_NAME
            plot_run(logs, str(out), picture, loss="loss" if scores else "loss, nats a token")
            self.say(f"picture      {picture}")
        self.say(f"logs         {out}/*/{metrics.FILE_NAME}")
        self.say(f"model        {self.folder}/checkpoint-{logs[self.optimizer][-1]['step']}")

    def logs(self) -> dict[str, list[metrics.Entry]]:
        """The logs in the folder, of each optimizer that has been trained."""
        found = {name: metrics.read(self.recipe.out / key / metrics.FILE_NAME) for key, name in OPTIMIZERS.items()}
        return {name: entries for name, entries in found.items() if any("loss" in entry for entry in entries)}


R = TypeVar("R", bound=Recipe)


def command(kind: type[R], main: Callable[[R, Training], None]) -> typer.Typer:
    """The command line of a recipe: its options are the fields of `kind`, its help is the docstring of `main`."""
    hints = get_type_hints(kind, include_extras=True)

    def run(**values: Any) -> None:
        joined = dist.is_initialized()
        console = Console()
        try:
            os.environ.update(_rank_variables())
            first = os.environ["RANK"] == "0"
            recipe = kind(**values)
            says = os.environ.get("LOCAL_RANK", "0") == "0"  # what concerns its machine
            if recipe.deepspeed is not None:
                leftovers.clear(console.print if says else lambda _: None)
            compiling = (
                compilations.announced(console.print) if says and recipe.deepspeed is not None else nullcontext()
            )
            opened = (
                open_optimizer_folder(recipe.out, recipe.optimizer, recipe.resume, recipe) if first else nullcontext()
            )
            with opened, compiling, sigterm_asks() as asked_to_stop:
                if not joined:
                    tie(asked_to_stop)
                main(recipe, Training(recipe, console, first, asked_to_stop))
            if not joined:
                leave()
        except Stopped as stopped:
            if first:
                console.print(f"\n{stopped}")
            if not joined:
                leave(SIGTERM_CODE)
            raise typer.Exit(SIGTERM_CODE) from None
        except Exception as error:
            _say_why(error)
            if not joined and dist.is_initialized():
                end(1)  # other ranks may wait for this one: it must not wait for them
            raise typer.Exit(1) from None

    run.__doc__ = inspect.cleandoc(main.__doc__ or "")
    own_first = sorted(fields(kind), key=lambda field: field.name in Recipe.__dataclass_fields__)
    assert all(field.default is not MISSING for field in own_first), f"{kind.__name__} has a field without a default"
    parameters = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=f.default)
        for f in own_first
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    return app


def _say_why(error: Exception) -> None:
    """Print the reason in one line, after the traceback where that line may not be enough."""
    error = reasons.with_missing_ranks(error) or error
    if not reasons.is_explained(error):
        traceback.print_exception(error)
    reasons.print_error(reasons.of(error).text)


def _rank_variables() -> dict[str, str]:
    """The variables of this rank, as every launcher should set them. A single process takes any free port."""
    told = environment(os.environ)
    if told["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        told["MASTER_PORT"] = str(free_port())
    return told
