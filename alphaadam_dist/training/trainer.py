"""HF's Trainer as every training here uses it: sharded, logged, checkpointed and resumed in one way."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from rich.console import Console
from torch import nn
from torch.utils.data import RandomSampler
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from alphaadam_dist import AlphaAdam, parameter_groups
from alphaadam_dist.files import naming
from alphaadam_dist.training import checkpoints, metrics
from alphaadam_dist.training.callbacks import AlphaMetrics, CheckpointMarker, JsonlLog, ShowProgress
from alphaadam_dist.training.progress import TrainingProgress
from alphaadam_dist.training.reasons import with_missing_ranks
from alphaadam_dist.training.settings import OPTIONS

FSDP2: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
"""For TrainingArguments. Full state dicts: a checkpoint's model then loads with from_pretrained."""


def training_arguments(
    folder: Path, *, ds_config: dict[str, Any] | None, shard_fsdp: bool, bf16: bool | None, **options: Any
) -> TrainingArguments:
    """The Trainer's arguments; making them starts the process group.

    Make them before the model: ZeRO-3 loads it in parts.

    Args:
        folder: where the checkpoints go.
        ds_config: DeepSpeed's config, as a dictionary; None without DeepSpeed.
        shard_fsdp: shard with FSDP2.
        bf16: compute in bfloat16; None: only on a GPU that has it.
        options: any other TrainingArguments.
    """
    cuda = torch.cuda.is_available()
    sharding: dict[str, Any] = {"deepspeed": ds_config} if ds_config is not None else {}
    if shard_fsdp:
        sharding = FSDP2
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_grad_norm=1.0,
        logging_first_step=True,
        eval_strategy="steps",
        save_total_limit=2,
        use_cpu=not cuda,
        bf16=cuda and torch.cuda.is_bf16_supported() if bf16 is None else bf16,
        report_to="none",
        disable_tqdm=True,
        **sharding,
        **options,
    )
    if not cuda and shard_fsdp:
        shard_on_cpu(arguments)
    elif not cuda and ds_config is not None:
        import deepspeed

        # On the CPU the Trainer leaves this out. ZeRO-3 would then load a pretrained model as if there were one rank.
        deepspeed.init_distributed("gloo")
    return arguments


def shard_on_cpu(arguments: TrainingArguments) -> None:
    """Make Accelerate shard with FSDP on the CPU too. Call it after the arguments exist and before the Trainer does.

    Accelerate uses FSDP only where it finds several GPUs; elsewhere it replicates the model without a warning. All its
    objects share the state of the process, so they find what is written there.
    """
    assert arguments.device.type == "cpu"  # reading the device makes the state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def weights_dtype(arguments: TrainingArguments) -> torch.dtype:
    """The type to load weights in.

    FSDP and DDP keep weights in fp32 and cast them; DeepSpeed takes bf16 weights and makes fp32 copies.
    """
    return torch.bfloat16 if arguments.bf16 and arguments.deepspeed else torch.float32


def _client_optimizer(
    name: str, arguments: TrainingArguments, state_dtype: str | None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and options for the Trainer, which adds the weight decay of its two parameter groups."""
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    options = {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}
    if name not in OPTIONS:
        return torch.optim.AdamW, options
    return AlphaAdam, {**options, **OPTIONS[name], **({} if state_dtype is None else {"state_dtype": state_dtype})}


class WholeBatches(Trainer):
    """A Trainer whose epochs are whole batches of all ranks together: the same blocks on any number of ranks.

    The Trainer alone treats the rows that are left at the end of an epoch in two ways: it drops them, or, where it
    accumulates gradients, makes a smaller step of them.

    Attributes:
        by_name: entries of parameter_groups, in place of the Trainer's two groups.
    """

    by_name: Sequence[Mapping[str, Any]] | None = None

    def create_optimizer(self, *model: Any) -> torch.optim.Optimizer:
        """The optimizer, with the groups of `by_name` where there are any; everything else decays, too."""
        if self.by_name is not None and self.optimizer_cls_and_kwargs is not None:
            kind, options = self.optimizer_cls_and_kwargs
            whole: Any = next((one for one in model if one is not None), self.model)
            groups = parameter_groups(whole, self.by_name)
            if kind is not AlphaAdam:  # AdamW knows a group's own lr only, which the Trainer's schedulers keep
                for group in groups:
                    group["lr"] = group.get("lr", options["lr"]) * group.pop("lr_scale", 1)
            own = {"params": groups, "weight_decay": self.args.weight_decay}
            self.optimizer_cls_and_kwargs = kind, {**options, **own}
        return super().create_optimizer(*model)

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        whole = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if len(dataset) < whole:
            raise ValueError(
                f"--data has {len(dataset)} blocks, a step takes {whole}: give more text or a smaller --batch"
            )
        return RandomSampler(dataset, num_samples=len(dataset) // whole * whole)


def fit(
    optimizer: str,
    arguments: TrainingArguments,
    model: nn.Module,
    train: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    *,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    compute_loss: Callable[..., torch.Tensor] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    state_dtype: str | None = None,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> bool:
    """Train to `arguments.max_steps`, from the last complete checkpoint in `arguments.output_dir` if there is one.

    Returns whether it reached that step; a callback may have stopped it earlier.

    Writes `metrics.jsonl`, `tensorboard/` and the checkpoints into that folder. If a DeepSpeed config names an
    optimizer, DeepSpeed makes it; otherwise the Trainer makes `optimizer`, a name of `settings.OPTIMIZERS`, with
    `groups` of parameter_groups; `state_dtype` is of AlphaAdam's moments. With a `console` the first rank shows the
    progress there; without one every log entry is printed.

    Raises:
        ValueError: the folder has checkpoints that this run did not write.
        RuntimeError: the ranks lost each other; it says which ranks are missing.
    """
    folder = Path(str(arguments.output_dir))
    checkpoint = _last_checkpoint(folder)
    arguments.eval_on_start &= checkpoint is None
    logged = _log_callbacks(optimizer, arguments, folder, checkpoints.step_of(checkpoint), console)
    named = isinstance(arguments.deepspeed, dict) and "optimizer" in arguments.deepspeed
    trainer = WholeBatches(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[*logged, *callbacks, CheckpointMarker()],
        compute_loss_func=compute_loss,
        compute_metrics=compute_metrics,
        optimizer_cls_and_kwargs=None if named else _client_optimizer(optimizer, arguments, state_dtype),
    )
    trainer.by_name = groups
    if console is not None:
        trainer.remove_callback(PrinterCallback)
    try:
        with naming(folder), checkpoints.naming_failed_saves(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        explained = with_missing_ranks(error)
        if explained is None:
            raise
        raise explained from error
    return trainer.state.global_step >= arguments.max_steps


def _last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint. Raises ValueError where there are others that this run did not write."""
    checkpoint = checkpoints.take_up(folder)
    if strangers := checkpoints.strangers(folder):
        raise ValueError(
            f"{folder} has {', '.join(strangers)}, which this run did not write, and it keeps only its last two: move "
            "them elsewhere, or choose another --out"
        )
    return checkpoint


def _log_callbacks(
    optimizer: str, arguments: TrainingArguments, folder: Path, resumed_step: int, console: Console | None
) -> list[TrainerCallback]:
    """The callbacks that measure, log and show, in the order in which they must stand.

    What was logged after `resumed_step` is dropped: those steps are made again.
    """
    logged: list[TrainerCallback] = [AlphaMetrics()]
    if arguments.process_index == 0:
        log = folder / metrics.FILE_NAME
        metrics.truncate(log, resumed_step)
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        logged += [JsonlLog(log), TensorBoardCallback(writer)]
        if console is not None:
            logged.append(ShowProgress(TrainingProgress(console, optimizer, log, arguments.max_steps)))
    return logged
