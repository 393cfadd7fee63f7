"""Runs HF's Trainer on every rank of a pool, and a plain torch loop that does in one process what it should do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from alphaadam_dist import AlphaAdam
from alphaadam_dist.optimizer import AlphaOptimizer
from alphaadam_dist.training.trainer import shard_on_cpu
from tests.models import tiny_llama, token_batches
from tests.older import HF_ACCUMULATES
from tests.zero import engine

STEPS = 6
BATCH = 8  # sequences in an update: 2 ranks, micro-batches of 2, accumulated twice; or of 4, once
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 5e-3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.2,
    "max_grad_norm": 0.5, "warmup_steps": 3, "lr_scheduler_type": "cosine",
    "gradient_accumulation_steps": 2 if HF_ACCUMULATES else 1,
    "per_device_train_batch_size": 2 if HF_ACCUMULATES else 4, "per_device_eval_batch_size": 4, "max_steps": STEPS,
    "use_cpu": True, "report_to": [], "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1, "log_level": "error", "dataloader_pin_memory": False,
}  # fmt: skip
ADAM = {"lr": 5e-3, "betas": (0.8, 0.95), "eps": 1e-7}  # what these arguments ask of the optimizer


def auto_config(stage: int, scheduler: bool = False, **options: Any) -> dict[str, Any]:
    """A DeepSpeed config in which HF fills in every value that it can."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    result: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "optimizer": {"type": "AlphaAdam", "params": {**params, **options}},
    }
    if scheduler:
        names = ("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
        result["scheduler"] = {"type": "WarmupDecayLR", "params": dict.fromkeys(names, "auto")}
    return result


def client_config(stage: int, **zero: Any) -> dict[str, Any]:
    """The same without an optimizer: the Trainer brings it."""
    result = auto_config(stage)
    del result["optimizer"]
    result["zero_optimization"] |= zero
    return result


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The sequences of ``token_batches``, one after another."""

    def __init__(self, steps: int, seed: int = 2) -> None:
        self.tokens = token_batches(steps, BATCH, seed=seed).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.tokens[index].clone()
        labels[0] = -100  # nothing comes before it; HF 4.48 divides the loss by it all the same
        return {"input_ids": self.tokens[index], "labels": labels}


@contextlib.contextmanager
def clean() -> Iterator[None]:
    """Leave nothing of Accelerate's and HF's process-wide state to the next run in this process."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before, threads = dict(os.environ), torch.get_num_threads()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(before)


def find(optimizer: Any) -> Any:
    """What the wrappers of Accelerate and DeepSpeed hold in the end."""
    while not isinstance(optimizer, AlphaOptimizer | torch.optim.AdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def in_order() -> Any:
    """HF's Trainer, taking the sequences one after another; older ones have no argument for that."""
    from transformers import Trainer

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def train(folder: str, ds_config: dict[str, Any] | None, arguments: dict[str, Any] | None = None, *,
          client: dict[str, Any] | None = None, optimizer: type = AlphaAdam, seed: int = 0, resume: str | None = None,
          build: Callable[[], nn.Module] | None = None, callbacks: Callable[[], list[Any]] | None = None,
          evaluate: bool = False, watch: bool = True, state: bool = True) -> dict[str, Any]:  # fmt: skip
    """Train under HF's Trainer with the optimizer of the config, or with one of the client's and its options.

    Args:
        seed: of the model's weights, so that a resumed run can start from others than it should end with.
        resume: a checkpoint folder to go on from.
        build: makes the model, after TrainingArguments did what zero.Init needs.
        callbacks: makes callbacks to add.
        evaluate: pass an evaluation set.
        watch: read alpha and the counts after every step.
        state: read them at the end.
    """
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    seen: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(engine.observe(find(kwargs["optimizer"])))

    with clean():
        args = TrainingArguments(output_dir=folder, deepspeed=ds_config, **{**ARGUMENTS, **(arguments or {})})
        if args.fsdp:
            shard_on_cpu(args)
        model = build() if build else tiny_llama(seed)
        trainer = in_order()(
            model=model,
            args=args,
            train_dataset=Sequences(STEPS),
            eval_dataset=Sequences(1, seed=3) if evaluate else None,
            callbacks=[*([Watch()] if watch else []), *(callbacks() if callbacks else [])],
            optimizer_cls_and_kwargs=None if client is None else (optimizer, client),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        found = find(trainer.optimizer)
        result = {
            "seen": seen,
            "optimizer": type(found).__name__,
            "logs": trainer.state.log_history,
            "groups": [{k: g[k] for k in ("lr", "betas", "eps", "weight_decay") if k in g} for g in found.param_groups],
            "params": engine.masters(trainer.model_wrapped) if ds_config else own_params(trainer.model),
        }
        if state and isinstance(found, AlphaOptimizer):
            result["state"] = found._adopt().state()
        if ds_config:
            trainer.model_wrapped.destroy()
    return result


def llama_under_zero_init() -> nn.Module:
    """tiny_llama, born in partitions as HF does where ZeRO-3 is on: no rank ever holds all of it."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    whole = tiny_llama()
    model = AutoModelForCausalLM.from_config(whole.config)
    assert all(hasattr(param, "ds_id") for param in model.parameters()), "zero.Init was not on"
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            model.load_state_dict(whole.state_dict())
    return model


def own_params(model: nn.Module) -> dict[str, Tensor]:
    """The whole parameters by name; of FSDP2's shards, a collective."""
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in params.items()}


def hf_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The Trainer's two groups: norms and biases are spared from decay."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": ARGUMENTS["weight_decay"]},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    """The one group of an optimizer that the JSON names."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": ARGUMENTS["weight_decay"]}]


def cosine(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The Trainer's cosine with warm-up."""
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, ARGUMENTS["warmup_steps"], STEPS)


def alone(groups: Callable[[nn.Module], list[dict[str, Any]]], options: dict[str, Any] | None = None, *,
          scheduler: Callable[[Any], Any] = cosine, clip: float = 0.5, optimizer: type = AlphaAdam,
          model: nn.Module | None = None) -> dict[str, Any]:  # fmt: skip
    """A plain loop over whole batches in one process: loss, clipping, step, schedule."""
    model = tiny_llama() if model is None else model
    ours = optimizer(groups(model), **{**ADAM, **(options or {})})
    schedule = scheduler(ours)
    seen = []
    for batch in token_batches(STEPS, BATCH):
        model(input_ids=batch, labels=batch).loss.backward()
        if clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        ours.step()
        schedule.step()
        ours.zero_grad()
        seen.append(engine.observe(ours))
    return {"params": own_params(model), "seen": seen}
