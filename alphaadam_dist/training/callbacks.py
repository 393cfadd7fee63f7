"""Trainer callbacks: AlphaAdam's numbers in every log, the log file, progress, whole checkpoints, and a stop in time.

`AlphaMetrics` must stand before the callbacks that write logs out: it adds its numbers to the entry they receive.
"""

from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alphaadam_dist.integrations.hf_trainer import log_metrics
from alphaadam_dist.training import checkpoints, metrics
from alphaadam_dist.training.progress import TrainingProgress


class AlphaMetrics(TrainerCallback):
    """Adds AlphaAdam's `metrics()` (alpha, agreement, evidence, steps) to the entries that carry a training loss."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Add them to this entry."""
        log_metrics(state, kwargs["logs"], kwargs["optimizer"])
        return control


class JsonlLog(TrainerCallback):
    """Writes every log entry to a file, on one rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Append the entry with its step."""
        if state.is_world_process_zero:
            metrics.append(self.path, {"step": state.global_step, **kwargs["logs"]})
        return control


class ShowProgress(TrainerCallback):
    """Draws the progress bar from the log file. It must stand behind `JsonlLog`, which writes that file."""

    def __init__(self, progress: TrainingProgress) -> None:
        self.progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Start the bar."""
        self.progress.__enter__()
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Show the newest numbers."""
        self.progress.update()
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Leave the bar as it stands."""
        self.progress.__exit__(None, None, None)
        return control


class CheckpointMarker(TrainerCallback):
    """Notes that a checkpoint is begun, and marks it complete with the checksums of its files once all ranks wrote it.

    It stands last, behind callbacks that ask for a save or add files to one.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Note what the Trainer is about to write."""
        if control.should_save:
            checkpoints.begin(_checkpoint(args, state))
        return control

    on_epoch_end = on_step_end

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Wait for the other ranks, then record every file with them."""
        checkpoints.mark_complete(_checkpoint(args, state))
        return control


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


class SaveAndStop(TrainerCallback):
    """Saves at the end of the step and stops, once any rank was asked to.

    The ranks agree at the end of every step, in an all-reduce of one number: they must save together. The log gets an
    entry for the steps since the last one, so a curve averaged over several steps has one point more.
    """

    def __init__(self, asked: Event) -> None:
        self.asked = asked

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the other ranks."""
        asked = torch.tensor(int(self.asked.is_set()), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if bool(asked):
            control.should_log = control.should_save = control.should_training_stop = True
        return control
