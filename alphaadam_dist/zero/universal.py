"""DeepSpeed's universal checkpoints: a folder of whole tensors, one subfolder for each parameter.

zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt     at stages 1 and 2 also step.pt
zero/optimizer_state.pt                          parameter groups, loss scale; at stage 3 the step
*_model_states.pt                                buffers, frozen parameters, which parameters are in which group
"""

import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor

from ..rounding import PARAMETER_DTYPES
from ..shards import clean_names
from .rank_files import PARTITION
from .unused import MISSED

SQUARES = "exp_avg_sq"
MOMENTS = ("exp_avg", SQUARES)
_IN_THE_FILES = [ZeroStageEnum, LossScaler, DynamicLossScaler]
_HOW_TO_MAKE_ONE = (
    "python -m deepspeed.checkpoint.ds_to_universal --input_folder CHECKPOINT/TAG "
    "--output_folder CHECKPOINT/TAG_universal --inject_missing_state"
)


@dataclass(frozen=True)
class Universal:
    """A universal checkpoint, its large tensors still in their files.

    Attributes:
        folder: where it is.
        shapes: of every parameter in training, by its name in the model.
        steps: how often each parameter in training was stepped, a 0-dim float32 tensor.
        others: what else is in the model's state_dict: buffers and frozen parameters.
        tied: second name -> first name of parameters that have two.
        groups: the optimizer's parameter groups; their "params" are names.
    """

    folder: Path
    shapes: dict[str, torch.Size]
    steps: dict[str, Tensor]
    others: dict[str, Tensor]
    tied: dict[str, str]
    groups: list[dict[str, Any]]

    def tensor(self, name: str, key: str) -> Tensor:
        """A parameter (key "fp32") or a moment of it, whole, float32 also where bf16 was saved, on the CPU.

        Raises Damaged where the file is damaged, or is another parameter's, as far as shape and sign tell.
        """
        path = self.folder / "zero" / name / f"{key}.pt"
        held = load(path)
        shape = self.shapes[name]
        with reading(path):
            tensor: Tensor = held["param"] if isinstance(held, dict) else held
            if tensor.shape not in (shape, (shape.numel(),)):  # stage 3 saves it flat
                raise Damaged(f"{path} has shape {tuple(tensor.shape)}, the model {tuple(shape)}: make it again")
            if tensor.dtype not in PARAMETER_DTYPES:
                raise Damaged(f"{path} has dtype {tensor.dtype} where float32 or bfloat16 belongs: make it again")
            if key == SQUARES and bool((tensor < 0).any()):
                raise Damaged(f"{path} has values below 0, so they are no squares: make it again")
            return tensor.view(shape).float()


class Damaged(ValueError):
    """A file is not what was written; the message names it and says what to do."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or foreign file makes of its reader into an error that names it."""
    try:
        yield
    except Damaged:
        raise
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise
        raise Damaged(f"{path} cannot be read ({error}): make it again") from None
    except Exception as error:
        raise Damaged(
            f"{path} is damaged or holds something else ({type(error).__name__}: {error}): make it again"
        ) from None


def load(path: Path) -> Any:
    """What torch.save wrote, mapped from the file, after comparing its checksums, which torch.load does not.

    Raises:
        Damaged: the file is damaged, or holds objects other than tensors, plain Python and DeepSpeed's loss scaler.
    """
    with reading(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except zipfile.BadZipFile as error:
            raise Damaged(f"{path} is damaged, it was cut short or overwritten ({error}): make it again") from None
        if damaged is not None:
            raise Damaged(f"{path} is damaged, the checksum of {damaged} in it is wrong: make it again")
        with torch.serialization.safe_globals(_IN_THE_FILES):
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except UnpicklingError:
                strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if not strange:
                    raise
        raise Damaged(
            f"{path} holds {', '.join(strange)}, and unpickling such objects can run any code: leave them out of what "
            "you save, or, if you trust the file, name them to torch.serialization.add_safe_globals in Python first"
        )


def _load_dict(path: Path) -> dict[str, Any]:
    held = load(path)
    if not isinstance(held, dict):
        raise Damaged(f"{path} holds a {type(held).__name__} where a dictionary belongs: make it again")
    return held


def saved_optimizer(folder: str | Path) -> dict[str, Any]:
    """The optimizer's own state_dict: its groups, and at stage 3 the state of the first rank. Raises Damaged."""
    path = Path(folder) / "zero" / "optimizer_state.pt"
    held = _load_dict(path)
    with reading(path):
        state: dict[str, Any] = held if "param_groups" in held else held["optimizer_state_dict"]
        return state


def read(folder: Path) -> Universal:
    """Open a universal checkpoint. Raises ValueError where it is none, or not whole, or of a tensor-parallel model."""
    zero = folder / "zero"
    at = zero / "optimizer_state.pt"
    if not at.is_file():
        raise ValueError(
            f"{folder} is no universal checkpoint, or a half-written one: it has no zero/optimizer_state.pt. Make one "
            f"with: {_HOW_TO_MAKE_ONE}"
        )
    held = _load_dict(at)
    with reading(at):
        saved_groups, stage3 = held["param_groups"], _stage(held) == 3
        ranks = int(held["partition_count"]) if stage3 else 1
        chosen = [[int(flat) for flat in group["params"]] for group in saved_groups]
        step = _step(held["optimizer_state_dict"]["state"][0]["step"]) if stage3 else None
    states = _model_states(folder, ranks)
    at_first, first = next(iter(states.items()))
    with reading(at_first):
        # the optimizer's parameters are flats; their model parameters are listed in the same order
        held_shapes = [_merged(first["param_shapes"][flat] for flat in flats) for flats in chosen]
        groups = [
            {key: value for key, value in group.items() if key not in (MISSED, PARTITION)} | {"params": list(held)}
            for group, held in zip(saved_groups, held_shapes, strict=True)
        ]
        shapes = {name: torch.Size(shape) for name, shape in _merged(held_shapes).items()}
        tied = {str(alias): str(name) for alias, name in dict(first["shared_params"]).items()}
        clean = clean_names([*shapes, *(first["frozen_param_shapes"] or {})])
        missed = {name: int(saved_groups[0].get(MISSED, {}).get(clean[name], 0)) for name in shapes}
    _check_all_there(zero, shapes, ("fp32", *MOMENTS) if stage3 else ("fp32", *MOMENTS, "step"))
    updates = {name: _step_file(zero / name / "step.pt") if step is None else step for name in shapes}
    return Universal(
        folder=folder,
        shapes=shapes,
        steps={name: count - missed[name] for name, count in updates.items()},
        others=_others(states, shapes),
        tied=tied,
        groups=groups,
    )


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _check_all_there(zero: Path, names: Iterable[str], keys: Sequence[str]) -> None:
    missing = [f"{name}/{key}.pt" for name in names for key in keys if not (zero / name / f"{key}.pt").is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{zero} lacks {missing[0]}{more}: it is half-written, or was not trained with AlphaAdam or AdamW. Make it "
            f"again with: {_HOW_TO_MAKE_ONE}"
        )


def _stage(held: dict[str, Any]) -> int:
    return int(held.get("zero_stage", 1))  # BF16_Optimizer, which is stage 1, leaves it out


def _step_file(path: Path) -> Tensor:
    held = load(path)
    with reading(path):
        return _step(held)


def _step(held: Any) -> Tensor:
    step = float(held)
    if not (step >= 0 and step.is_integer()):
        raise ValueError(f"step is {step}, which is no count")
    return torch.tensor(step, dtype=torch.float32, device="cpu")


def _model_states(folder: Path, ranks: int) -> dict[Path, Any]:
    """The contents of the *_model_states.pt files, of the first rank first; stages 1 and 2 have one."""
    at = {}
    for path in folder.glob("*mp_rank_*_model_states.pt"):
        found = re.fullmatch(r"(?:.*pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt", path.name)
        if found is None or int(found[2]) > 0:
            raise ValueError(f"{path} is of a model cut by tensor or pipeline parallelism, which is not converted")
        at[int(found[1] or 0)] = path
    missing = [rank for rank in range(ranks) if rank not in at]
    if missing:
        raise ValueError(
            f"{folder} has no *_model_states.pt of rank {missing[0]}: it is half-written. Make it again with: "
            f"{_HOW_TO_MAKE_ONE}"
        )
    return {at[rank]: _load_dict(at[rank]) for rank in range(ranks)}


def _others(states: dict[Path, Any], trained: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Buffers and frozen parameters, by their names in the model."""
    others: dict[str, Tensor] = {}
    at, first = next(iter(states.items()))
    with reading(at):
        frozen = {name: torch.Size(shape) for name, shape in (first["frozen_param_shapes"] or {}).items()}
        for name, value in first["module"].items():
            if name not in trained and name not in first["shared_params"]:
                others[name] = value
    for name, shape in frozen.items():
        if name in others and others[name].shape != shape:  # at stage 3 each rank has a part of it
            parts = []
            for path, state in states.items():
                with reading(path):
                    parts.append(state["frozen_param_fragments"][name].flatten())
            with reading(at):
                others[name] = torch.cat(parts)[: shape.numel()].view(shape)
    return others
