"""FSDP1 (FullyShardedDataParallel): the one place that knows its private names.

FSDP1 flattens the parameters of a unit into one vector, pads it on the right and gives each rank a slice. With
``use_orig_params=False`` the optimizer gets that slice, a FlatParameter, which knows which elements of which
parameters it holds. With ``use_orig_params=True`` it gets a plain 1-D tensor for every parameter, what the slice holds
of it, and only a mark says that it is not the whole: neither its full size nor the process group can be read from it.
"""

import functools
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from ..rounding import consecutive
from ..torch_versions import TESTED
from . import Shard, clean_name

MARKS = {"original": "_fsdp_flattened", "flat": "_is_flat_param"}
MODULE_NAMES = {
    "torch.distributed.fsdp._common_utils": ("FSDP_FLATTENED",),
    "torch.distributed.fsdp._flat_param": ("FlatParameter", "_ShardParamInfo"),
}
FLAT_NAMES = ("_fqns", "_numels", "_shard_param_infos", "_shard_numel_padded")
INFO_NAMES = ("in_shard", "offset_in_shard", "numel_in_shard", "intra_param_start_idx")
FLAT_SUFFIX = "_flat_param"  # the name under which a module holds its FlatParameter


@functools.cache
def missing_names() -> list[str]:
    """The names of the tables above that the installed torch does not have."""
    missing = []
    for where, names in MODULE_NAMES.items():
        try:
            module: Any = importlib.import_module(where)
        except ImportError:
            missing.append(where)
            continue
        missing += [f"{where}.{name}" for name in names if not hasattr(module, name)]
    if missing:
        return missing
    from torch.distributed.fsdp import _common_utils, _flat_param

    if MARKS["original"] != _common_utils.FSDP_FLATTENED:
        missing.append(f"the mark {MARKS['original']!r}")
    probe = torch.zeros(0, device="cpu")
    setattr(probe, MARKS["flat"], True)
    if not isinstance(probe, _flat_param.FlatParameter):
        missing.append(f"the mark {MARKS['flat']!r}")
    missing += [f"_ShardParamInfo.{name}" for name in INFO_NAMES if not hasattr(_flat_param._ShardParamInfo, name)]
    return missing


def _moved(missing: list[str]) -> RuntimeError:
    return RuntimeError(
        f"torch {torch.__version__} no longer has {', '.join(missing)}, by which FSDP1's shards are told from "
        f"whole parameters. Install a tested version (torch>={TESTED[0]},<={TESTED[1]}), shard with FSDP2 "
        "(torch.distributed.fsdp.fully_shard), or give sharding='replicated' if no parameter is sharded by FSDP1"
    )


def marked(param: Tensor) -> bool:
    """FSDP1 made this tensor of a part of the model.

    Raises:
        RuntimeError: the installed torch has other private names, so that nobody can tell.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    missing = missing_names()
    if missing:
        raise _moved(missing)
    return bool(vars(param)) and any(getattr(param, mark, False) for mark in MARKS.values())


def marks_of(param: Tensor) -> dict[str, Any]:
    """The attributes by which this module knows a parameter. Deep copies lose them, a FlatParameter's pickle too."""
    return {name: vars(param)[name] for name in (*MARKS.values(), *FLAT_NAMES) if name in vars(param)}


def shards(param: Tensor, key: str, rank: int | None) -> list[Shard]:
    """What this rank's slice holds: one shard of an original parameter, or one of each in a FlatParameter.

    ``rank`` is this rank's in the process group over which FSDP1 shards, None where the optimizer was given none.

    Raises:
        ValueError: no process group; or the parameter is whole (``ShardingStrategy.NO_SHARD``).
        RuntimeError: the FlatParameter lacks a name of the table.
    """
    if rank is None:
        raise ValueError(
            f"parameter {key!r} (shape {tuple(param.shape)}) is a shard of FSDP1 (FullyShardedDataParallel), and "
            "process_group=None: give the optimizer process_group=, the group over which FSDP1 shards, which is "
            "model.process_group (under HYBRID_SHARD too, where it holds one copy of the model)"
        )
    if getattr(param, MARKS["flat"], False):
        return _of_flat(param, key)
    if param.ndim != 1:
        raise ValueError(
            f"parameter {key!r} is under FSDP1 and has its whole shape {tuple(param.shape)}, as with "
            "ShardingStrategy.NO_SHARD or inside summon_full_params: give sharding='replicated' for the first, leave "
            "the context before step() for the second"
        )
    return [Shard(key, (rank,), 0, param.numel(), None)]


def keys(param: Any, key: str) -> list[str]:
    """The model parameters that an optimizer parameter of the name ``key`` is made of, on this rank or elsewhere."""
    if not getattr(param, MARKS["flat"], False):
        return [key]
    missing = [f"FlatParameter.{name}" for name in FLAT_NAMES if not hasattr(param, name)]
    if missing:
        raise _moved(missing)
    prefix = key.removesuffix(FLAT_SUFFIX) if key.endswith(FLAT_SUFFIX) else f"{key}."
    return [prefix + clean_name(name) for name in param._fqns]


def _of_flat(flat: Any, key: str) -> list[Shard]:
    held, end = [], 0
    for name, whole, info in zip(keys(flat, key), flat._numels, flat._shard_param_infos, strict=True):
        if info.in_shard:
            part = info.intra_param_start_idx, info.numel_in_shard
            at = consecutive(*part)
            held.append(Shard(name, part, info.offset_in_shard, info.numel_in_shard, whole, positions=at))
            end = info.offset_in_shard + info.numel_in_shard
    assert end + flat._shard_numel_padded == flat.numel(), "all but the padding belongs to some parameter"
    return held
