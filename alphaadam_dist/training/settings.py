"""The settings of a training run, checked once and written beside its results.

The launcher starts one process a rank, and a run may go on days after it was interrupted, so the settings live in
a file in the run's folder: every rank, and every later `--resume`, reads the same ones.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

OPTIMIZERS = {"alphaadam": "AlphaAdam", "adamw": "AdamW"}
FILE_NAME = "settings.json"


@dataclass(frozen=True)
class SavedSettings:
    """Settings that a run's folder remembers: everything that decides what it computes, except its optimizer."""

    def saved(self) -> dict[str, Any]:
        """What is remembered, by option name, as JSON keeps it."""
        return asdict(self)

    def save(self, run: Path) -> None:
        """Write the settings into the run's folder, whole or not at all."""
        partial = run / f"{FILE_NAME}.partial"
        partial.write_text(json.dumps(self.saved(), indent=2) + "\n")
        os.replace(partial, run / FILE_NAME)

    def check_resumes(self, run: Path) -> None:
        """Refuse to go on with a run under settings other than its own: the curve would be neither run's."""
        started = json.loads((run / FILE_NAME).read_text())
        for name, now in self.saved().items():
            was = started.get(name)
            if was != now:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} is {now}, but the run in {run} was started with {was}: "
                    f"give --{option} {was} to go on, or another --out to start afresh"
                )


def check_path(option: str, value: str) -> None:
    """Raise ValueError where a value is clearly a path, not an id of the Hugging Face hub, and nothing is there."""
    is_path = value.startswith((".", "/")) or value.endswith("/") or value.count("/") > 1
    if is_path and not Path(value).exists():
        raise ValueError(f"--{option} is {value}: there is no such file or folder; check the path")


@dataclass(frozen=True)
class Settings(SavedSettings):
    """The settings of the main job."""

    model: str
    data: str
    zero: int | None
    fsdp: bool
    offload: bool
    steps: int
    gpus: int
    lr: float
    batch: int
    block: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            check_path(name, getattr(self, name))
        for name in ("steps", "gpus", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be 1 or more")
        if self.block < 2:
            raise ValueError(f"--block is {self.block}: predicting a next token takes blocks of 2 tokens or more")
        if self.fsdp and self.zero is not None:
            raise ValueError(f"--fsdp with --zero {self.zero}: FSDP2 or ZeRO shards the model, so give one of them")
        if not self.fsdp and self.zero not in range(4):
            raise ValueError(f"--zero is {self.zero}: ZeRO has the stages 0, 1, 2 and 3")
        if self.offload and self.zero not in (2, 3):
            raise ValueError(f"--offload with {self.sharding}: offloading needs --zero 2 or --zero 3")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}: it must be above 0, such as 1e-3")

    @property
    def sharding(self) -> str:
        """How the model is sharded, for people: FSDP2 or ZeRO-N."""
        return "FSDP2" if self.fsdp else f"ZeRO-{self.zero}"

    @classmethod
    def load(cls, run: Path) -> Self:
        """Read the settings of the run in this folder."""
        return cls(**json.loads((run / FILE_NAME).read_text()))

    def share(self, ranks: int) -> tuple[int, int]:
        """Blocks a rank takes at a time, and how many times before a step, so that a step's batch is always the same.

        The batch is what the run was started with, ``gpus * batch``. No rank takes more than ``batch`` blocks at a
        time, which is what its memory is known to hold. Raises ValueError where the ranks cannot share it equally.
        """
        whole = self.gpus * self.batch
        if whole % ranks:
            raise ValueError(
                f"--gpus is {ranks}, but a step of this run takes {whole} blocks, which {ranks} ranks cannot share "
                f"equally: give a divisor of {whole}"
            )
        each = whole // ranks
        times = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= self.batch)
        return each // times, times

    def check_resumes(self, run: Path) -> None:
        """Refuse to go on with a run under settings other than its own: the curve would be neither run's.

        Only the number of ranks may change, under FSDP2: its checkpoints load on any number, and `share` keeps the
        batch.
        """
        started = self.load(run)
        if self.gpus != started.gpus:
            if not self.fsdp:
                raise ValueError(
                    f"--gpus is {self.gpus}, but the run in {run} was started with {started.gpus}, and a ZeRO "
                    f"checkpoint is for the number of ranks that wrote it: give --gpus {started.gpus} to go on, or "
                    "make it a universal checkpoint (docs/deepspeed.md). Runs with --fsdp may change --gpus"
                )
            started.share(self.gpus)
        super(Settings, replace(self, gpus=started.gpus)).check_resumes(run)
