"""DeepSpeed's private names: a table checked at start, and the only functions that use them.

DeepSpeed's ZeRO wrappers hold a partition of the model in flat fp32 tensors and call the optimizer's ``step()`` once
for each: per parameter group (stages 1 and 2) or per sub-group (stage 3). ``unscale_and_clip_grads`` runs just before
each of those calls, after overflow and norm are known. At its first call in a step the gradients of all other flats
are still there as backward left them, which is where an exact step counts.
"""

from __future__ import annotations

import importlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor

from ..shards import Shard, clean_name

TESTED_VERSIONS = ("0.19.7", "0.19.8")

CLASS_NAMES = {
    "deepspeed.runtime.engine.DeepSpeedEngine": (
        "_configure_basic_optimizer", "_configure_optimizer", "_do_optimizer_sanity_check", "autotp_size",
        "bf16_master_weights_and_gradients", "bf16_optimizer_states", "fp16_enabled",
        "fp16_master_weights_and_gradients", "optimizer_name", "optimizer_params", "steps_per_print", "super_offload",
        "torch_autocast_dtype",
        "torch_autocast_enabled", "zenflow_config", "zero_offload_optimizer", "zero_optimization_stage",
        "zero_partial_offload",
    ),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "step", "unscale_and_clip_grads", "_get_preflattened_grad_partition",
    ),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": ("step", "unscale_and_clip_grads"),
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": ("step",),
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": ("refresh_fp32_params",),
    "deepspeed.runtime.fp16.loss_scaler": ("DynamicLossScaler", "LossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.runtime.zero.utils": ("ZERO_SUPPORTED_OPTIMIZERS",),
    "deepspeed.runtime.pipe.module": ("PipelineModule",),
    "deepspeed.utils.bwc": ("bwc_tensor_model_parallel_world_size", "bwc_pipeline_parallel_world_size"),
    "deepspeed.utils.groups": ("_get_expert_parallel_group",),
}  # fmt: skip

INSTANCE_NAMES = {
    DeepSpeedEngine: (
        "basic_optimizer", "has_moe_layers", "module", "monitor", "mpu", "optimizer", "param_names",
        "seq_data_parallel_group", "_config",
    ),
    DeepSpeedZeroOptimizer: (
        "averaged_gradients", "clip_grad", "dp_process_group", "loss_scale", "real_dp_process_group",
        "round_robin_bit16_groups", "round_robin_bit16_padding", "single_partition_of_fp32_groups",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        "averaged_gradients", "clip_grad", "dp_process_group", "fp16_groups", "fp32_partitioned_groups_flat",
        "loss_scale", "offload_optimizer",
    ),
    BF16_Optimizer: ("bf16_groups", "dp_process_group", "fp32_groups_flat_partition", "real_dp_process_group"),
    FP16_UnfusedOptimizer: ("fp16_groups",),
}  # fmt: skip


def missing_names() -> list[str]:
    """The names of the table that the installed DeepSpeed does not have."""
    missing = []
    for where, names in CLASS_NAMES.items():
        module, _, last = where.rpartition(".")
        try:
            try:
                holder: Any = importlib.import_module(where)
            except ModuleNotFoundError:
                holder = getattr(importlib.import_module(module), last)
        except (ImportError, AttributeError):
            missing.append(where)
            continue
        missing += [f"{where}.{name}" for name in names if not hasattr(holder, name)]
    return missing


def moved(missing: Sequence[str]) -> RuntimeError:
    """The error for names that are not where the tested versions have them."""
    return RuntimeError(
        f"alphaadam_dist cannot run under DeepSpeed {deepspeed.__version__}: it no longer has {', '.join(missing)}, "
        f"through which the model is counted. Install a tested version (deepspeed=={' or '.join(TESTED_VERSIONS)})"
    )


def check_instance(obj: Any) -> None:
    """Raise RuntimeError if an engine or wrapper lacks an attribute that this module reads."""
    for cls, names in INSTANCE_NAMES.items():
        if isinstance(obj, cls):
            missing = [f"{cls.__name__}.{name}" for name in names if not hasattr(obj, name)]
            if missing:
                raise moved(missing)


def keys(engine: Any) -> dict[Tensor, str]:
    """The name of every parameter, made different for experts that share a local name across ranks."""
    return {param: _key(clean_name(name), _expert_rank(param)) for name, param in engine.module.named_parameters()}


def keys_of_all_ranks(engine: Any) -> Iterator[str]:
    """``keys`` of this rank and of the others: experts of equal local names live on every expert-parallel rank."""
    for name, param in engine.module.named_parameters():
        rank = _expert_rank(param)
        world = 1 if rank is None else dist.get_world_size(_expert_group(param))
        for other in range(world):
            yield _key(clean_name(name), None if rank is None else other)


def _key(name: str, expert_rank: int | None) -> str:
    return name if expert_rank is None else f"{name}[expert rank {expert_rank}]"


def _expert_group(param: Any) -> dist.ProcessGroup:
    return groups._get_expert_parallel_group(param.group_name)


def _expert_rank(param: Any) -> int | None:
    return None if getattr(param, "allreduce", True) else dist.get_rank(_expert_group(param))


class Wrapper(ABC):
    """A DeepSpeed optimizer as attach.py sees it.

    Attributes:
        zero: DeepSpeed's object, or the optimizer itself where DeepSpeed wraps nothing around it.
        in_parts: it steps the model part by part, so somebody must count before the first part.
        group: the process group over which the whole model is held; None where every rank holds it.
    """

    in_parts = True

    def __init__(self, engine: Any) -> None:
        self.zero = engine.optimizer
        self.group: dist.ProcessGroup | None = getattr(self.zero, "dp_process_group", None)

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """The tensors that the optimizer steps, in order."""

    def extents(self) -> list[int]:
        """Elements of each, padding included."""
        return [flat.numel() for flat in self.flats()]

    @abstractmethod
    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        """Which elements of which model parameters each holds."""

    def gradients(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """(flat, gradient in pieces) for all flats, at the first ``unscale_and_clip_grads`` of a step in parts."""
        raise AssertionError("a wrapper that steps the model in one call is not asked")


class Replicated(Wrapper):
    """Stage 0: the model's own parameters in fp32, or an fp32 master of each in bf16 and fp16."""

    in_parts = False

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.group = engine.seq_data_parallel_group if engine.has_moe_layers else None  # experts differ between ranks
        self.optimizer = engine.basic_optimizer
        self.half = isinstance(self.zero, FP16_UnfusedOptimizer)
        if self.half:
            # it was made to step once with zero gradients, which decayed the masters and counted as a step
            self.optimizer.state.clear()
            self.zero.refresh_fp32_params()
            if engine.fp16_enabled():
                warnings.warn(
                    f"DeepSpeed {deepspeed.__version__} at stage 0 divides fp16 gradients by the loss scale but never "
                    "multiplies the loss by it (with AdamW too): use zero_optimization.stage 1, or bf16",
                    stacklevel=2,
                )

    def flats(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        models = [param for group in self.zero.fp16_groups for param in group] if self.half else self.flats()
        return [[Shard(names[param], (), 0, param.numel(), param.numel())] for param in models]


class Bf16(Wrapper):
    """Stage 1 with bf16 parameters and fp32 accumulation: one flat per group, all stepped in one call."""

    in_parts = False

    def flats(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_flat_partition)

    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        held = []
        for params, size, group in zip(
            self.zero.bf16_groups, self.extents(), self.zero.real_dp_process_group, strict=True
        ):
            held.append(_slice_of_flat(params, [0] * len(params), size, group, names))
        return held


class Stage1And2(Wrapper):
    """ZeRO stages 1 and 2, with and without CPU offload: one flat per parameter group."""

    def flats(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        # not through each parameter's _hp_mapping: under round_robin_gradients its offsets ignore the reordering
        return [
            _slice_of_flat(params, paddings, size, group, names)
            for params, paddings, size, group in zip(
                self.zero.round_robin_bit16_groups,
                self.zero.round_robin_bit16_padding,
                self.extents(),
                self.zero.real_dp_process_group,
                strict=True,
            )
        ]

    def gradients(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        for i, flat in enumerate(self.flats()):
            if flat.grad is not None:  # offloaded, or the group about to be stepped
                yield flat, [flat.grad]
            else:
                whole = self.zero._get_preflattened_grad_partition(i)
                yield flat, self.zero.averaged_gradients[i] if whole is None else [whole]


def _slice_of_flat(
    params: Sequence[Tensor], paddings: Sequence[int], size: int, group: dist.ProcessGroup, names: dict[Tensor, str]
) -> list[Shard]:
    """What a rank's slice of ``size`` elements holds of parameters that follow each other, each with its padding."""
    begin, offset, held = dist.get_rank(group) * size, 0, []
    for param, padding in zip(params, paddings, strict=True):
        first, last = max(offset, begin), min(offset + param.numel(), begin + size)
        if first < last:
            part = first - offset, last - first
            held.append(Shard(names[param], part, first - begin, last - first, param.numel()))
        offset += param.numel() + padding
    return held


class Stage3(Wrapper):
    """ZeRO stage 3, with and without offload: one flat per sub-group, a padded slice of each parameter in it."""

    def flats(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def extents(self) -> list[int]:
        # not the flats' own sizes: those that lie on NVMe are empty
        return [sum(param.partition_numel() for param in params) for params in self.zero.fp16_groups]

    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        rank = dist.get_rank(self.zero.dp_process_group)
        by_flat = []
        for params in self.zero.fp16_groups:
            held, offset = [], 0
            for param in params:
                padded = param.partition_numel()
                start = rank * padded
                numel = max(0, min(padded, param.ds_numel - start))
                if numel:
                    held.append(Shard(names[param], (start, numel), offset, numel, param.ds_numel))
                offset += padded
            by_flat.append(held)
        return by_flat

    def gradients(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        if self.zero.offload_optimizer:
            # DeepSpeed copies gradients to the CPU without waiting where the caller accumulates them itself
            deepspeed.get_accelerator().synchronize()
        for i, flat in enumerate(self.flats()):
            yield flat, [flat.grad] if flat.grad is not None else self.zero.averaged_gradients[i]


def wrapper_of(engine: Any) -> Wrapper:
    """The view on an engine's optimizer."""
    kinds: tuple[tuple[type, type[Wrapper]], ...] = (
        (DeepSpeedZeroOptimizer_Stage3, Stage3),
        (DeepSpeedZeroOptimizer, Stage1And2),
        (BF16_Optimizer, Bf16),
    )
    for theirs, ours in kinds:
        if isinstance(engine.optimizer, theirs):
            return ours(engine)
    return Replicated(engine)


def optimizer_states(saved: Any) -> Iterator[dict[str, Any]]:
    """The optimizer's own state_dicts inside what a wrapper's ``load_state_dict`` is given."""
    for state in saved if isinstance(saved, list) else [saved]:
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            held = state.get(key) if isinstance(state, dict) else None
            if isinstance(held, dict) and "param_groups" in held:
                yield held


def unscale_factor(zero: Any, total_norm: Any) -> Tensor:
    """What ``unscale_and_clip_grads`` multiplies gradients by, also where the norm is invalid: what it makes of a 1."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        one = zero.fp32_partitioned_groups_flat[0].new_ones(())
        flat = SimpleNamespace(grad=one)
        given = SimpleNamespace(
            loss_scale=zero.loss_scale, clip_grad=zero.clip_grad, fp32_partitioned_groups_flat=[flat]
        )
        DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads(given, 0, total_norm)
    else:
        one = zero.single_partition_of_fp32_groups[0].new_ones(())
        DeepSpeedZeroOptimizer.unscale_and_clip_grads(zero, [one], total_norm)
    return one


def free_shared_memory() -> None:
    """Remove this rank's buffer of DeepSpeed's all-reduce on CPUs, 66 MiB of memory that would stay in /dev/shm.

    DeepSpeed never does. For the end of a rank: the others have opened the buffer when they initialized.
    """
    place = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path("/dev/shm", "_".join(map(str, ("deepspeed_allreduce_buffer", os.getuid(), *place)))).unlink(missing_ok=True)
