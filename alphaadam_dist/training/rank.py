"""One rank of a training run. The launcher starts it as `python -m alphaadam_dist.training.rank RUN OPTIMIZER`.

It reads the run's settings, goes on from the last complete checkpoint if there is one, trains, and leaves in
RUN/OPTIMIZER: `metrics.jsonl`, `tensorboard/` and the checkpoints. SIGTERM to any rank saves and stops all of them.
It ends when `alphaadam train` does, and tells it why if it fails.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alphaadam_dist.training.reasons import tell
from alphaadam_dist.training.settings import OPTIMIZERS, Settings
from alphaadam_dist.training.tie import STARTED_BY, end, tie


def main() -> None:
    """Run this rank."""
    run, optimizer = Path(sys.argv[1]), sys.argv[2]
    with sigterm_asks() as asked_to_stop:
        tie(asked_to_stop)
        if STARTED_BY in os.environ:
            threading.Thread(target=listen, args=(asked_to_stop,), daemon=True).start()
        try:
            train(run, optimizer, asked_to_stop)
        except Exception as error:
            tell(error)
            end(1)  # the others may wait for this rank: it must not wait for them
        leave()


@contextmanager
def sigterm_asks() -> Iterator[threading.Event]:
    """SIGTERM sets the event instead of ending the process."""
    asked_to_stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    try:
        yield asked_to_stop
    finally:
        signal.signal(signal.SIGTERM, before)


def listen(asked_to_stop: threading.Event) -> None:
    """Set the event when `alphaadam train`, at the other end of standard input, writes a byte.

    The ranks share the pipe, and one of them gets the byte.
    """
    while os.read(0, 1):
        asked_to_stop.set()


def leave(code: int = 0) -> None:
    """End this rank with an exit code, without the interpreter's own shutdown, if it is in a process group.

    In that shutdown, threads of torch and DeepSpeed that still run sometimes abort a process that has finished, and
    its launcher then reports a failed run. Where mpi4py told DeepSpeed who the ranks are, MPI is ended too: mpirun
    reports a rank that left without that as failed.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.Finalize()
        end(code)


def train(run: Path, optimizer: str, asked_to_stop: threading.Event) -> None:
    """Train with one optimizer until the run's last step, or until asked to stop.

    Raises RuntimeError where the ranks lose each other, with the ranks that are missing.
    """
    from transformers import set_seed

    from alphaadam_dist.groups import read_file
    from alphaadam_dist.training.callbacks import SaveAndStop
    from alphaadam_dist.training.corpus import load_corpus
    from alphaadam_dist.training.data import collate, token_blocks
    from alphaadam_dist.training.ds_config import load_ds_config
    from alphaadam_dist.training.models import load_model, load_tokenizer
    from alphaadam_dist.training.trainer import fit, training_arguments, weights_dtype

    settings = Settings.load(run)
    name = OPTIMIZERS[optimizer]
    steps = settings.steps
    blocks, times = settings.share(int(os.environ["WORLD_SIZE"]))
    groups = None if settings.groups is None else read_file(Path(settings.groups))
    ds_config = None
    if not settings.fsdp:
        assert settings.zero is not None
        ds_config = load_ds_config(settings.zero, settings.offload, name, groups)
    arguments = training_arguments(
        run / optimizer,
        ds_config=ds_config,
        shard_fsdp=settings.fsdp,
        bf16=None,
        max_steps=steps,
        per_device_train_batch_size=blocks,
        gradient_accumulation_steps=times,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=min(max(1, steps // 60), 10),
        eval_steps=min(max(1, steps // 10), 500),
        save_steps=min(max(1, steps // 5), 500),
        seed=settings.seed,
        dataloader_drop_last=True,
    )
    with arguments.main_process_first(desc="preparing the data"):
        corpus = load_corpus(settings.data)
        tokenizer = load_tokenizer(settings.model, corpus)
        train_blocks, held_out_blocks = token_blocks(corpus, tokenizer, settings.block)
    set_seed(settings.seed)
    model = load_model(settings.model, tokenizer, settings.block, weights_dtype(arguments))
    fit(
        name,
        arguments,
        model,
        train_blocks,
        held_out_blocks,
        tokenizer,
        collate,
        callbacks=[SaveAndStop(asked_to_stop)],
        groups=groups,
    )


if __name__ == "__main__":
    main()
