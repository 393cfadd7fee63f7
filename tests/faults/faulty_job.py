"""`alphaadam train` whose ranks meet with an accident, in place of the real thing: `python -m tests.faults.faulty_job`.

FAULT in the environment is PLACE:RANK:STEP:FOLDER. At that step, and only the first time (FOLDER remembers), that rank
kills itself at that place: ``step``, between backward and the optimizer; ``all-reduce``, when its counts are due;
``save``, with its part of the checkpoint half written.
"""

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from alphaadam_dist.cli import app
from alphaadam_dist.statistics import Statistics
from alphaadam_dist.training import main_job, rank
from alphaadam_dist.training.start_ranks import command

PLACE, RANK, STEP, FOLDER = os.environ["FAULT"].split(":")


def accident() -> None:
    mark = Path(FOLDER) / f"{PLACE}-happened"
    if os.environ["RANK"] == RANK and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Accident(TrainerCallback):
    """Happens before the optimizer's step, or is made ready for it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == int(STEP) and PLACE == "step":
            accident()


def in_all_reduce() -> None:
    reduce = Statistics._all_reduce

    def reduced(self: Statistics, *args: Any, **kwargs: Any) -> Any:
        if self.opened == int(STEP):
            accident()
        return reduce(self, *args, **kwargs)

    Statistics._all_reduce = reduced  # type: ignore[method-assign]


def in_save() -> None:
    save = Trainer._save_rng_state

    def saved(self: Trainer, output_dir: str) -> None:
        if self.state.global_step == int(STEP):
            accident()
        save(self, output_dir)
        dist.barrier()

    Trainer._save_rng_state = saved  # type: ignore[method-assign]


def run_rank() -> None:
    {"step": lambda: None, "all-reduce": in_all_reduce, "save": in_save}[PLACE]()
    init = Trainer.__init__

    def with_accident(self: Trainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(Accident())

    Trainer.__init__ = with_accident  # type: ignore[method-assign]
    rank.main()


def run_command() -> None:
    def faulty(*args: Any) -> list[str]:
        return [
            "tests.faults.faulty_job" if word == "alphaadam_dist.training.rank" else word for word in command(*args)
        ]

    main_job.command = faulty
    app()


if __name__ == "__main__":
    run_rank() if "RANK" in os.environ else run_command()
