"""From a DeepSpeed universal checkpoint to torch.distributed.checkpoint (DCP), which FSDP2 and all of torch load.

The result has the keys of ``get_state_dict(model, optimizer)``: ``model.NAME``, ``optimizer.state.NAME.exp_avg``,
``exp_avg_sq`` and ``step``, and ``optimizer.param_groups``. There is no format of our own.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from ..files import what_stops_writing
from ..shards import clean_name
from . import universal


def convert(source: Path, target: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write a DeepSpeed universal checkpoint as a DCP checkpoint, in one process.

    Tensors are read, checked and written one by one, so it needs the memory of the largest of them. The target appears
    when it is whole; until then it is a folder beside it, with ``.partial`` in its name.

    Args:
        source: the folder that DeepSpeed's ds_to_universal wrote.
        target: a folder that does not exist.
        progress: called with the bytes written so far and in all.

    Raises:
        ValueError: the source is no universal checkpoint, is half-written or damaged, or the target exists.
        OSError: the target cannot be written.
    """
    partial = target.with_name(f"{target.name}.partial")
    for path in (target, partial):
        if os.path.lexists(path):
            raise ValueError(f"{path} exists: remove it if it is not needed, or give another folder to write to")
    held = universal.read(source)
    partial.mkdir(parents=True)
    try:
        _save(_FromFiles(held, progress), partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # all of it was written here
        raise


def _save(planner: _FromFiles, folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(planner.layout(), checkpoint_id=folder, planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, ValueError):
            raise cause from None
        refused = what_stops_writing(folder)  # torch does not say what the system did
        if refused is not None:
            raise refused from None
        raise cause from None


class _FromFiles(dcp.DefaultSavePlanner):
    """Saves a state of tensors without data, and fetches each from its file when it is to be written."""

    def __init__(self, held: universal.Universal, progress: Callable[[int, int], None]) -> None:
        super().__init__()
        self._held, self._progress = held, progress
        self._sources: dict[str, tuple[str, str]] = {}
        self._done = 0

    def layout(self) -> dict[str, Any]:
        """The state to save; parameters and moments have shape and dtype only."""
        held = self._held
        model: dict[str, Tensor] = {clean_name(name): tensor for name, tensor in held.others.items()}
        state: dict[str, dict[str, Tensor]] = {}
        for name in held.shapes:
            key = clean_name(name)
            model[key] = self._promise(f"model.{key}", name, "fp32")
            moments = {m: self._promise(f"optimizer.state.{key}.{m}", name, m) for m in universal.MOMENTS}
            state[key] = {"step": held.steps[name], **moments}
        for alias, name in held.tied.items():
            if name in held.shapes:
                model[clean_name(alias)] = self._promise(f"model.{clean_name(alias)}", name, "fp32")
        groups = []
        for group in held.groups:
            names = [clean_name(name) for name in group["params"]]
            groups.append({**group, "params": names, "param_names": names})
        return {"model": model, "optimizer": {"state": state, "param_groups": groups}}

    def _promise(self, key: str, name: str, which: str) -> Tensor:
        self._sources[key] = (name, which)
        return torch.empty(self._held.shapes[name], dtype=torch.float32, device="meta")

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Called by DCP for each object, when it is written."""
        source = self._sources.get(index.fqn)
        if source is None:
            return super().lookup_object(index)
        tensor = self._held.tensor(*source)
        self._done += tensor.nbytes
        self._progress(self._done, self._total())
        return tensor

    def _total(self) -> int:
        return 4 * sum(self._held.shapes[name].numel() for name, _ in self._sources.values())
