"""One rank of a training run. The launcher starts it as `python -m alphaadam_dist.training.job RUN OPTIMIZER`.

It reads the run's settings, goes on from the last complete checkpoint if there is one, trains, and leaves in
RUN/OPTIMIZER: `metrics.jsonl`, `tensorboard/` and the checkpoints. SIGTERM to any rank saves and stops all of them.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from alphaadam_dist.training.settings import OPTIMIZERS, Settings

TIED_TO_PARENT = "ALPHAADAM_TIED_TO_PARENT"


def main() -> None:
    """Run this rank."""
    run, optimizer = Path(sys.argv[1]), sys.argv[2]
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    if os.environ.get(TIED_TO_PARENT):
        threading.Thread(target=_follow_parent, args=(asked_to_stop,), daemon=True).start()
    train(run, optimizer, asked_to_stop)


def _follow_parent(asked_to_stop: threading.Event) -> None:
    """Stop when `alphaadam train`, at the other end of standard input, writes a byte; end at once when it ends.

    The ranks share the pipe, and one of them gets the byte. A rank whose parent was killed must not train on unseen
    and write into a folder that the next start resumes.
    """
    while os.read(0, 1):
        asked_to_stop.set()
    os._exit(1)


def train(run: Path, optimizer: str, asked_to_stop: threading.Event) -> None:
    """Train with one optimizer until the run's last step, or until asked to stop.

    Raises RuntimeError where the ranks lose each other, with the ranks that are missing.
    """
    import torch
    import torch.distributed as dist
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainingArguments, set_seed
    from transformers.integrations import TensorBoardCallback

    from alphaadam_dist import lost
    from alphaadam_dist.training import checkpoints, fsdp, metrics
    from alphaadam_dist.training.callbacks import AlphaMetrics, CheckpointMarker, JsonlLog, SaveAndStop
    from alphaadam_dist.training.corpus import load_corpus
    from alphaadam_dist.training.data import collate, token_blocks
    from alphaadam_dist.training.ds_config import load_ds_config
    from alphaadam_dist.training.models import load_model, load_tokenizer
    from alphaadam_dist.training.trainer import WholeBatches

    settings = Settings.load(run)
    folder = run / optimizer
    steps = settings.steps
    blocks, times = settings.share(int(os.environ["WORLD_SIZE"]))
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported()
    if settings.fsdp:
        sharding = fsdp.ARGUMENTS
    else:
        assert settings.zero is not None
        sharding = {"deepspeed": load_ds_config(settings.zero, settings.offload, OPTIMIZERS[optimizer])}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=blocks,
        gradient_accumulation_steps=times,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=min(max(1, steps // 60), 10),
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=min(max(1, steps // 10), 500),
        save_steps=min(max(1, steps // 5), 500),
        save_total_limit=2,
        seed=settings.seed,
        dataloader_drop_last=True,
        **sharding,
        use_cpu=not cuda,
        bf16=bf16,
        report_to="none",
        disable_tqdm=True,
    )
    if settings.fsdp and not cuda:
        fsdp.shard_on_cpu(arguments)
    elif not cuda:
        import deepspeed

        # On CPU the Trainer leaves this out, and ZeRO-3 would load a pretrained model as if it were alone.
        deepspeed.init_distributed("gloo")
    with arguments.main_process_first(desc="preparing the data"):
        corpus = load_corpus(settings.data)
        tokenizer = load_tokenizer(settings.model, corpus)
        train_blocks, held_out_blocks = token_blocks(corpus, tokenizer, settings.block)
    set_seed(settings.seed)
    # FSDP keeps fp32 parameters and casts them for each layer; DeepSpeed makes its own fp32 copies of bf16 ones.
    dtype = torch.bfloat16 if bf16 and not settings.fsdp else torch.float32
    model = load_model(settings.model, tokenizer, settings.block, dtype)

    checkpoint = checkpoints.take_up(folder)
    resumed_step = checkpoints.step_of(checkpoint)
    log = folder / metrics.FILE_NAME
    callbacks = [AlphaMetrics(), CheckpointMarker(), SaveAndStop(asked_to_stop)]
    if arguments.process_index == 0:
        metrics.truncate(log, resumed_step)
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        callbacks += [JsonlLog(log), TensorBoardCallback(writer)]
    trainer = WholeBatches(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks,
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=fsdp.optimizer(OPTIMIZERS[optimizer], arguments) if settings.fsdp else None,
    )
    try:
        with checkpoints.naming_failed_saves(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except lost.RankLost:
        raise
    except RuntimeError as error:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise lost.explained(error, "training", dist.group.WORLD) from error
        raise


if __name__ == "__main__":
    main()
