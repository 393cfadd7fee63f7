"""DeepSpeed's universal checkpoints: a folder of whole tensors, one subfolder for each parameter.

zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt     at stages 1 and 2 also step.pt
zero/optimizer_state.pt                          parameter groups, loss scale; at stage 3 the step
*_model_states.pt                                buffers, frozen parameters, which parameters are in which group
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor

from ..shards import clean_names
from .rank_files import PARTITION
from .unused import MISSED

MOMENTS = ("exp_avg", "exp_avg_sq")
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
        """A parameter (key "fp32") or a moment of it, whole, float32, on the CPU. Raises ValueError where damaged."""
        path = self.folder / "zero" / name / f"{key}.pt"
        held = load(path)
        tensor: Tensor = held["param"] if isinstance(held, dict) else held
        shape = self.shapes[name]
        if tensor.numel() != shape.numel():
            raise ValueError(f"{path} has shape {tuple(tensor.shape)}, the model {tuple(shape)}: make it again")
        return tensor.view(shape)  # stage 3 saves it flat


def load(path: Path) -> Any:
    """What torch.save wrote, mapped from the file, after comparing its checksums, which torch.load does not.

    Raises:
        ValueError: the file is damaged, or holds objects other than tensors, plain Python and DeepSpeed's loss scaler.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged, it was cut short or overwritten ({error}): make it again") from None
    if damaged is not None:
        raise ValueError(f"{path} is damaged, the checksum of {damaged} in it is wrong: make it again")
    try:
        with torch.serialization.safe_globals(_IN_THE_FILES):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError:
        with torch.serialization.safe_globals(_IN_THE_FILES):
            strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        raise ValueError(
            f"{path} holds {', '.join(strange)}, and unpickling such objects can run any code: leave them out of what "
            "you save, or, if you trust the file, name them to torch.serialization.add_safe_globals in Python first"
        ) from None


def saved_optimizer(folder: str | Path) -> dict[str, Any]:
    """The optimizer's own state_dict: its groups, and at stage 3 the state of the first rank. Raises ValueError."""
    held: dict[str, Any] = load(Path(folder) / "zero" / "optimizer_state.pt")
    return held if "param_groups" in held else held["optimizer_state_dict"]


def read(folder: Path) -> Universal:
    """Open a universal checkpoint. Raises ValueError where it is none, or not whole, or of a tensor-parallel model."""
    zero = folder / "zero"
    if not (zero / "optimizer_state.pt").is_file():
        raise ValueError(
            f"{folder} is no universal checkpoint, or a half-written one: it has no zero/optimizer_state.pt. Make one "
            f"with: {_HOW_TO_MAKE_ONE}"
        )
    held = load(zero / "optimizer_state.pt")
    ranks = _model_states(folder, held)
    first = ranks[0]
    groups = []
    shapes: dict[str, torch.Size] = {}
    for group in held["param_groups"]:
        # the optimizer's parameters are flats; their model parameters are listed in the same order
        flats = [first["param_shapes"][flat] for flat in group["params"]]
        names = [name for flat in flats for name in flat]
        shapes |= {name: torch.Size(shape) for flat in flats for name, shape in flat.items()}
        ours = {key: value for key, value in group.items() if key not in (MISSED, PARTITION)}
        groups.append({**ours, "params": names})
    stage3 = _stage(held) == 3
    wanted = ("fp32", *MOMENTS) if stage3 else ("fp32", *MOMENTS, "step")
    missing = [f"{name}/{key}.pt" for name in shapes for key in wanted if not (zero / name / f"{key}.pt").is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{zero} lacks {missing[0]}{more}: it is half-written, or was not trained with AlphaAdam or AdamW. Make it "
            f"again with: {_HOW_TO_MAKE_ONE}"
        )
    if stage3:
        steps = dict.fromkeys(shapes, held["optimizer_state_dict"]["state"][0]["step"])
    else:
        steps = {name: load(zero / name / "step.pt") for name in shapes}
    clean = clean_names([*shapes, *(first["frozen_param_shapes"] or {})])
    missed = held["param_groups"][0].get(MISSED, {})
    return Universal(
        folder=folder,
        shapes=shapes,
        steps={
            name: torch.as_tensor(step, dtype=torch.float32, device="cpu") - missed.get(clean[name], 0)
            for name, step in steps.items()
        },
        others=_others(ranks, shapes),
        tied=dict(first["shared_params"]),
        groups=groups,
    )


def _stage(held: dict[str, Any]) -> int:
    return int(held.get("zero_stage", 1))  # BF16_Optimizer, which is stage 1, leaves it out


def _model_states(folder: Path, held: dict[str, Any]) -> list[dict[str, Any]]:
    """The contents of the *_model_states.pt files, by rank; stages 1 and 2 have one."""
    at = {}
    for path in folder.glob("*mp_rank_*_model_states.pt"):
        found = re.fullmatch(r"(?:.*pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt", path.name)
        if found is None or int(found[2]) > 0:
            raise ValueError(f"{path} is of a model cut by tensor or pipeline parallelism, which is not converted")
        at[int(found[1] or 0)] = path
    ranks = int(held["partition_count"]) if _stage(held) == 3 else 1
    missing = [rank for rank in range(ranks) if rank not in at]
    if missing:
        raise ValueError(
            f"{folder} has no *_model_states.pt of rank {missing[0]}: it is half-written. Make it again with: "
            f"{_HOW_TO_MAKE_ONE}"
        )
    return [load(at[rank]) for rank in range(ranks)]


def _others(ranks: list[dict[str, Any]], trained: dict[str, torch.Size]) -> dict[str, Tensor]:
    first = ranks[0]
    frozen = first["frozen_param_shapes"] or {}
    others = {}
    for name, value in first["module"].items():
        if name in trained or name in first["shared_params"]:
            continue
        if name in frozen and value.shape != frozen[name]:  # at stage 3 each rank has a part of it
            parts = torch.cat([rank["frozen_param_fragments"][name].flatten() for rank in ranks])
            value = parts[: frozen[name].numel()].view(frozen[name])
        others[name] = value
    return others
