"""The settings of a training run, with their defaults: checked once and written beside the run's results.

The launcher starts one process a rank, and a run may go on days after it was interrupted. So the settings are in a
file in the run's folder: every rank, and every later `--resume`, reads the same ones. No import here is heavy: the
command line reads this module before anything starts.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

from alphaadam_dist.files import read_object, write_whole
from alphaadam_dist.training.text import digest_of_data, digest_of_place

# What is compared: its folder, or --optimizer, and its name.
OPTIMIZERS = {"alphaadam": "AlphaAdam", "lookahead": "look-ahead", "adamw": "AdamW"}
# AlphaAdam's options in those that it makes: the paper's rule, and what trains best in docs/results.md.
OPTIONS: dict[str, dict[str, float]] = {"AlphaAdam": {}, "look-ahead": {"gamma": 1.0, "lookahead": 0.25}}
FILE_NAME = "settings.json"
MANY, LARGE = 10**9, 10**7
"""Limits: MANY for a number of steps, LARGE for the size of a batch, a model or a cluster."""

TINY = "tiny-llama"
DEFAULT_STEPS = 240
DEFAULT_BATCH = 8
# AdamW's best on the main job, and the default for both optimizers: benchmarks/main_job_lr_sweep.py finds it,
# benchmarks/results/ has the runs.
TINY_LR = 3e-3
FINE_TUNING_LR = 2e-5
TINY_BLOCK = 128
FINE_TUNING_BLOCK = 512

_INPUTS = "inputs"
_INPUT_DIGESTS = {
    "data": digest_of_data, "held_out": digest_of_data, "model": digest_of_place, "tokenizer": digest_of_place,
    "deepspeed": digest_of_place, "groups": digest_of_place,
}  # fmt: skip
_RESTORE = "restore it, or start afresh with another --out"


def default_lr(model: str) -> float:
    """The learning rate where none is given."""
    return TINY_LR if model == TINY else FINE_TUNING_LR


def default_block(model: str) -> int:
    """The number of tokens in a block where none is given."""
    return TINY_BLOCK if model == TINY else FINE_TUNING_BLOCK


@dataclass(frozen=True)
class SavedSettings:
    """Settings that a run's folder remembers: everything that decides what it computes, except its optimizer.

    It also remembers digests of the local files that an option names.
    """

    def saved(self) -> dict[str, Any]:
        """What is remembered, by option name, as JSON keeps it."""
        return asdict(self)

    def save(self, run: Path) -> None:
        """Write the settings into the run's folder, whole or not at all."""
        held = self.saved() | {_INPUTS: self._inputs()}
        write_whole(run / FILE_NAME, json.dumps(held, indent=2) + "\n")

    def _inputs(self) -> dict[str, str]:
        digests = {name: digest(getattr(self, name, None)) for name, digest in _INPUT_DIGESTS.items()}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def read(self, run: Path) -> dict[str, Any]:
        """What the run in this folder remembers. Raises ValueError where that is not what `saved` names."""
        path = run / FILE_NAME
        held = read_object(path, _RESTORE)
        expected = set(self.saved())
        check_names(path, set(held) - {_INPUTS}, expected, expected)
        if not isinstance(held.setdefault(_INPUTS, {}), dict):
            raise ValueError(f"{path} has {_INPUTS}={held[_INPUTS]!r} where an object belongs: {_RESTORE}")
        return held

    def check_resumes(self, run: Path) -> None:
        """Refuse to go on with a run under settings other than its own: the curve would be neither run's."""
        started = self.read(run)
        for name, now in self.saved().items():
            if started[name] != now:
                raise ValueError(
                    f"{_option(name)} is {now}, but the run in {run} was started with {started[name]}: "
                    f"give {_option(name)} {started[name]} to go on, or another --out to start afresh"
                )
        inputs = self._inputs()
        for name, was in started[_INPUTS].items():
            if inputs.get(name) != was:
                raise ValueError(
                    f"{_option(name)} {getattr(self, name, '')} has changed since the run in {run} was started: "
                    "restore what it was to go on, or give another --out to start afresh"
                )


def check_names(path: Path, found: set[str], needed: set[str], allowed: set[str]) -> None:
    """Raise ValueError where a settings file was written by another version, or for another program."""
    missing, unknown = sorted(needed - found), sorted(found - allowed)
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(
            f"{path} is of another version or another program, it {' and '.join(said)}: go on with what wrote it, or "
            "start afresh with another --out"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_path(option: str, value: str) -> None:
    """Raise ValueError where a value is clearly a path, not an id of the Hugging Face hub, and nothing is there."""
    is_path = value.startswith((".", "/")) or value.endswith("/") or value.count("/") > 1
    if is_path and not Path(value).exists():
        raise ValueError(f"--{option} is {value}: there is no such file or folder; check the path")


def check_counts(settings: SavedSettings, least: Mapping[str, int], most: int = MANY) -> None:
    """Raise ValueError where an option, if it is given, is below its least value or above `most`."""
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise ValueError(f"{_option(name)} is {value}: it must be {low} or more")
        if value is not None and value > most:
            raise ValueError(f"{_option(name)} is {value}: it must be {most:,} or less")


def check_rates(settings: SavedSettings, above_zero: tuple[str, ...]) -> None:
    """Raise ValueError where one of these numbers, if it is given, is not above 0 and finite."""
    for name in above_zero:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{_option(name)} is {value}: it must be above 0 and finite, such as 1e-3")


def check_groups(path: str | Path | None) -> None:
    """Raise ValueError where --groups is given and is no file of parameter groups that AlphaAdam takes."""
    if path is None:
        return
    from alphaadam_dist import groups  # torch comes with it

    if not Path(path).is_file():
        raise ValueError(f"--groups is {path}: there is no such file; write a list there, as in {groups.EXAMPLE}")
    groups.read_file(Path(path))


def check_seed(seed: int) -> None:
    """Raise ValueError where numpy would not take the seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}: it must be from 0 to {2**32 - 1}")


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
    groups: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            check_path(name, getattr(self, name))
        check_counts(self, {"steps": 1})
        check_counts(self, {"gpus": 1, "batch": 1}, LARGE)
        if self.block < 2:
            raise ValueError(f"--block is {self.block}: predicting a next token takes blocks of 2 tokens or more")
        check_counts(self, {"block": 2}, LARGE)
        check_rates(self, ("lr",))
        check_seed(self.seed)
        check_groups(self.groups)
        if self.fsdp and self.zero is not None:
            raise ValueError(f"--fsdp with --zero {self.zero}: FSDP2 or ZeRO shards the model, so give one of them")
        if not self.fsdp and self.zero not in range(4):
            raise ValueError(f"--zero is {self.zero}: ZeRO has the stages 0, 1, 2 and 3")
        if self.offload and self.zero not in (2, 3):
            raise ValueError(f"--offload with {self.sharding}: offloading needs --zero 2 or --zero 3")

    @property
    def sharding(self) -> str:
        """How the model is sharded, for people: FSDP2 or ZeRO-N."""
        return "FSDP2" if self.fsdp else f"ZeRO-{self.zero}"

    @classmethod
    def load(cls, run: Path) -> Self:
        """Read the settings of the run in this folder. Raises ValueError where the file is not what `save` writes."""
        path = run / FILE_NAME
        held = read_object(path, _RESTORE)
        held.pop(_INPUTS, None)
        types: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        check_names(path, set(held), set(types), set(types))
        for name, value in held.items():
            if not isinstance(value, types[name]) or (isinstance(value, bool) and types[name] is not bool):
                raise ValueError(
                    f"{path} has {name}={value!r}, which is of another kind than {_option(name)}: {_RESTORE}"
                )
        return cls(**held)

    def share(self, ranks: int) -> tuple[int, int]:
        """How many blocks a rank takes at a time, and how many times in a step: a step's batch is always the same.

        It has the blocks that the run was started with, ``gpus * batch``. No rank takes more than ``batch`` blocks at
        a time: its memory is known to hold those. Raises ValueError where the ranks cannot share them equally.
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

        Under FSDP2 the number of ranks may change: its checkpoints load on any number, and `share` keeps the batch.
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
