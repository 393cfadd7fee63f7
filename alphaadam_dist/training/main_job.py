"""The main job: train with AlphaAdam, with look-ahead and AdamW beside it, draw and report."""

import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from alphaadam_dist.training import checkpoints, compilations, leftovers, metrics
from alphaadam_dist.training.plots import plot_run
from alphaadam_dist.training.progress import TrainingProgress
from alphaadam_dist.training.run_folder import PICTURE_NAME
from alphaadam_dist.training.settings import OPTIMIZERS, Settings
from alphaadam_dist.training.start_ranks import LOG_NAME, LaunchError, command, launch
from alphaadam_dist.training.summary import print_losses, print_samples


def run_main_job(console: Console, run: Path, settings: Settings, optimizers: list[str]) -> None:
    """Train with each optimizer that has not finished yet, then show how they compare."""
    for optimizer in optimizers:
        train_one(console, run, optimizer, settings)
    report(console, run, settings, optimizers)


def train_one(console: Console, run: Path, optimizer: str, settings: Settings) -> None:
    """Train with one optimizer from its last complete checkpoint, or from the start."""
    folder = run / optimizer
    step = checkpoints.step_of(checkpoints.choose(folder))
    if step == settings.steps:
        console.print(f"{OPTIMIZERS[optimizer]} has finished its {step} steps already.", highlight=False)
        return
    if step:
        console.print(f"{OPTIMIZERS[optimizer]} goes on from step {step}.", highlight=False)
    folder.mkdir(exist_ok=True)
    last = folder / f"checkpoint-{settings.steps}"
    line = command(run, optimizer, settings)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if not settings.fsdp:
        leftovers.clear(say)
    console.print(f"[dim]{escape(shlex.join([Path(line[0]).name, *line[1:]]))}[/dim]", highlight=False, soft_wrap=True)
    log = folder / metrics.FILE_NAME
    # The ranks do the same, but only after a start-up in which the bar would show the steps that were lost.
    metrics.truncate(log, step)
    with (
        TrainingProgress(console, OPTIMIZERS[optimizer], log, settings.steps) as progress,
        nullcontext() if settings.fsdp else compilations.announced(say),
    ):
        launch(line, folder, settings, progress.update)
    if not checkpoints.is_marked(last):  # DeepSpeed's launcher says nothing where its own helper was killed
        raise LaunchError(f"training in {folder} ended before step {settings.steps}: --resume goes on")


def report(console: Console, run: Path, settings: Settings, optimizers: list[str]) -> None:
    """Draw the picture, and print the losses, what the model writes, and where everything is."""
    logs = {OPTIMIZERS[optimizer]: metrics.read(run / optimizer / metrics.FILE_NAME) for optimizer in optimizers}
    picture = run / PICTURE_NAME
    ranks = f"{settings.gpus} rank{'s' if settings.gpus > 1 else ''}"
    where = f"{settings.model} on {settings.data}, {settings.sharding} on {ranks}"
    plot_run(logs, f"{where}, lr {settings.lr:g}, seed {settings.seed}", picture)
    console.print()
    print_losses(console, logs)
    console.rule(f"what the model trained with {OPTIMIZERS[optimizers[0]]} writes")
    print_samples(console, run / optimizers[0] / f"checkpoint-{settings.steps}")
    console.rule("files")
    # A path that is broken over lines can't be copied.
    for name, where in (
        ("picture", f"{picture}"),
        ("logs", f"{run}/*/{metrics.FILE_NAME}   {run}/*/{LOG_NAME}"),
        ("TensorBoard", f"tensorboard --logdir {run}"),
        ("checkpoints", f"{run}/*/checkpoint-{settings.steps}"),
    ):
        console.print(f"{name:12} {where}", highlight=False, markup=False, soft_wrap=True)
