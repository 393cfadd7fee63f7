"""DeepSpeed's private names: a table checked at start, and the only functions that use them.

DeepSpeed's ZeRO wrappers hold a partition of the model in flat fp32 tensors and call the optimizer's ``step()`` once
for each: per parameter group (stages 1 and 2) or per sub-group (stage 3). ``unscale_and_clip_grads`` runs just before
each of those calls, after overflow and norm are known. At its first call in a step the gradients of all other flats
are still there as backward left them, which is where an exact step counts.
"""

import functools
import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from ..rounding import consecutive
from ..shards import Shard
from ..step import Gradient
from . import nvme, older, versions

STAGE3_BUFFERS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"

CLASS_NAMES = {
    "deepspeed.runtime.engine.DeepSpeedEngine": (
        "_configure_basic_optimizer", "_configure_optimizer", "_do_optimizer_sanity_check",
        "_get_gradients_for_reduction", "_load_zero_checkpoint", "autotp_size", "bf16_master_weights_and_gradients",
        "bf16_optimizer_states", "fp16_enabled", "fp16_master_weights_and_gradients", "get_global_grad_norm",
        "gradient_clipping", "load_universal_checkpoint", "managed_gradient_accumulation", "optimizer_name",
        "optimizer_params", "steps_per_print", "super_offload", "torch_autocast_dtype", "torch_autocast_enabled",
        "zenflow_config", "zero_elastic_checkpoint", "zero_offload_optimizer", "zero_optimization_stage",
        "zero_partial_offload",
    ),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "step", "unscale_and_clip_grads", "get_gradient_for_reduction", "get_param_id",
        "is_gradient_accumulation_boundary", "reduce_gradients", "reduce_independent_p_g_buckets_and_remove_grads",
        "reduce_ready_partitions_and_remove_grads", "_finalize_cpu_offload_gradient_accumulation",
        "_get_preflattened_grad_partition",
    ),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "step", "unscale_and_clip_grads", "reduce_independent_p_g_buckets_and_remove_grads",
        "is_gradient_accumulation_boundary", "_finalize_offload_gradient_accumulation", "_prepare_sub_group",
        "_swappable_optimizer_subgroup",
    ),
    "deepspeed.runtime.base_optimizer.ZeROOptimizer": ("_configure_master_weights",),
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": ("step",),
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": ("refresh_fp32_params",),
    "deepspeed.runtime.fp16.loss_scaler": ("DynamicLossScaler", "LossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.runtime.zero.utils": ("ZERO_SUPPORTED_OPTIMIZERS",),
    **nvme.CLASS_NAMES,
    "deepspeed.runtime.pipe.module": ("PipelineModule",),
    "deepspeed.utils.bwc": ("bwc_tensor_model_parallel_world_size", "bwc_pipeline_parallel_world_size"),
    "deepspeed.runtime.utils": ("is_model_parallel_parameter",),
    "deepspeed.utils.groups": ("_get_expert_parallel_group",),
}  # fmt: skip

INSTANCE_NAMES = {
    DeepSpeedEngine: (
        "basic_optimizer", "has_moe_layers", "module", "monitor", "mpu", "optimizer", "param_names",
        "seq_data_parallel_group", "_config",
    ),
    DeepSpeedZeroOptimizer: (
        "averaged_gradients", "bit16_groups", "clip_grad", "cpu_offload", "dp_process_group", "loss_scale",
        "micro_step_id", "overlap_comm", "real_dp_process_group", "round_robin_bit16_groups",
        "round_robin_bit16_padding", "single_partition_of_fp32_groups",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        "averaged_gradients", "clip_grad", "dp_process_group", "fp16_groups", "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat", "loss_scale", "micro_step_id", "offload_optimizer",
        "_offload_boundary_param_ids", STAGE3_BUFFERS,
    ),
    BF16_Optimizer: (
        "bf16_groups", "dp_process_group", "fp32_groups_flat_partition", "fp32_groups_has_gradients",
        "real_dp_process_group",
    ),
    FP16_UnfusedOptimizer: ("fp16_groups", "fp32_groups", "overflow_checker"),
}  # fmt: skip


def missing_names() -> list[str]:
    """The names of the table that the installed DeepSpeed does not have, though it is not older than they are."""
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
        missing += [f"{where}.{name}" for name in names if not (hasattr(holder, name) or older.may_lack(name))]
    return missing


def allow(kind: type) -> None:
    """List an optimizer class among those that ZeRO supports, so that it needs no zero_allow_untested_optimizer."""
    if kind not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def allow_bf16_offload(kind: type) -> None:
    """Let an optimizer class step offloaded bf16 masters, which DeepSpeed leaves to its own CPU Adam."""
    if older.may_lack("_configure_master_weights"):
        return  # there are no such masters yet
    configure = getattr(ZeROOptimizer._configure_master_weights, "__wrapped__", ZeROOptimizer._configure_master_weights)

    @functools.wraps(configure)
    def configured(zero: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(zero.optimizer, kind):  # all that the flag does there is to ask for DeepSpeedCPUAdam
            kwargs["offload_enabled"] = False
        return configure(zero, *args, **kwargs)

    ZeROOptimizer._configure_master_weights = configured


def check_instance(obj: Any) -> None:
    """Raise RuntimeError if an engine or wrapper lacks an attribute that this module reads."""
    for cls, names in INSTANCE_NAMES.items():
        if isinstance(obj, cls):
            missing = [f"{cls.__name__}.{name}" for name in names if not (hasattr(obj, name) or older.may_lack(name))]
            if missing:
                raise versions.unserved(missing)


class Wrapper(ABC):
    """A DeepSpeed optimizer as attach.py sees it.

    Attributes:
        zero: DeepSpeed's object, or the optimizer itself where DeepSpeed wraps nothing around it.
        group: the process group over which ZeRO divides the model; None where every rank of it holds all.
    """

    def __init__(self, engine: Any) -> None:
        self.zero = engine.optimizer
        self.group: dist.ProcessGroup | None = getattr(self.zero, "dp_process_group", None)

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """The tensors that the optimizer steps, in order."""

    def numels(self) -> list[int]:
        """Elements of each, padding included."""
        return [flat.numel() for flat in self.flats()]

    @abstractmethod
    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        """Which elements of which model parameters each holds."""


class AtOnce(Wrapper):
    """It steps the model in one call, and takes zeros for the gradient of a parameter that has none."""

    @abstractmethod
    def watch_zero_filled(self, engine: Any, note: Callable[[list[Tensor]], None]) -> None:
        """Call ``note`` in every step with the parameters that no backward of this rank reached."""


class InParts(Wrapper):
    """It steps the model part by part, so somebody must count before the first part.

    Attributes:
        lands: gradients come to the flats in the last micro-batch of a step, if they are in it.
    """

    lands: bool

    @abstractmethod
    def gradients(self) -> Iterator[Gradient]:
        """Those of all flats, at the first ``unscale_and_clip_grads`` of a step. What reads it reads it to its end.

        Backwards: the update, which begins with the first, finds it still in the cache.
        """

    def count_first(self) -> None:
        """From now on every step reads ``gradients``."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """The model's parameters in the flats of all ranks."""

    @abstractmethod
    def stale(self, param: Tensor) -> Tensor | None:
        """Where DeepSpeed sums up the gradients of a parameter's micro-batches, from the last step on; None if nowhere.

        The first micro-batch overwrites it, later ones are added.
        """

    @abstractmethod
    def land(self, params: Iterable[Tensor]) -> None:
        """Bring the sums of these parameters to the flats, as the last micro-batch does with its own."""

    def watch_gradients(self, note: Callable[[Tensor, bool, bool], None]) -> None:
        """Call ``note`` whenever DeepSpeed is about to take a gradient into its reduction.

        With the parameter, and whether the micro-batch is the first and the last of the step.
        """
        reduce = self.zero.reduce_independent_p_g_buckets_and_remove_grads

        @functools.wraps(reduce)
        def noted(param: Tensor, *args: Any) -> None:
            note(param, self.zero.micro_step_id <= 0, older.at_boundary(self.zero))
            reduce(param, *args)

        self.zero.reduce_independent_p_g_buckets_and_remove_grads = noted


class Replicated(AtOnce):
    """Stage 0: the model's own parameters in fp32, or an fp32 master of each in bf16 and fp16."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.group = engine.seq_data_parallel_group if engine.has_moe_layers else None  # experts differ between ranks
        self.alone = dist.get_world_size(engine.seq_data_parallel_group) == 1
        self.optimizer = engine.basic_optimizer
        self.half = isinstance(self.zero, FP16_UnfusedOptimizer)
        if self.half:
            # it was made to step once with zero gradients, which decayed the masters and counted as a step
            self.optimizer.state.clear()
            self.optimizer._run.n = 0
            self.optimizer._run.statistics = None
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
        held = []
        for i, group in enumerate(self.optimizer.param_groups):
            given = group.get("param_names", [])
            for j, param in enumerate(self._models(i)):
                # one that is not in the engine's module has no name there
                outside = given[j] if len(given) == len(group["params"]) else f"parameter {j} of group {i}"
                at = consecutive(0, param.numel())
                held.append([Shard(names.get(param, outside), (), 0, param.numel(), param.numel(), positions=at)])
        return held

    def _models(self, group: int) -> list[Tensor]:
        return self.zero.fp16_groups[group] if self.half else self.optimizer.param_groups[group]["params"]

    def stepped(self) -> dict[Tensor, Tensor]:
        """What the optimizer steps for each parameter of the model."""
        models = [param for i in range(len(self.optimizer.param_groups)) for param in self._models(i)]
        return dict(zip(models, self.flats(), strict=True))

    def take_group(self, group: dict[str, Any]) -> None:
        """The optimizer has got another parameter group."""
        if self.half:
            params = list(group["params"])
            group["params"] = [param.detach().clone().float().requires_grad_() for param in params]
            self.zero.fp16_groups.append(params)
            self.zero.fp32_groups.append(group["params"])
            self.zero.overflow_checker.params += params

    def watch_zero_filled(self, engine: Any, note: Callable[[list[Tensor]], None]) -> None:
        collect = engine._get_gradients_for_reduction

        @functools.wraps(collect)
        def noted() -> Any:
            note([param for param in engine.module.parameters() if param.requires_grad and param.grad is None])
            return collect()

        engine._get_gradients_for_reduction = noted


class Bf16(AtOnce):
    """Stage 1 with bf16 parameters and fp32 accumulation: one flat per group, all stepped in one call."""

    def flats(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_flat_partition)

    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        held = []
        for params, size, group in zip(
            self.zero.bf16_groups, self.numels(), self.zero.real_dp_process_group, strict=True
        ):
            held.append(_slice_of_flat(params, [0] * len(params), size, group, names))
        return held

    def watch_zero_filled(self, engine: Any, note: Callable[[list[Tensor]], None]) -> None:
        step = self.zero.step

        @functools.wraps(step)
        def noted(*args: Any, **kwargs: Any) -> Any:
            params = [param for group in self.zero.bf16_groups for param in group]
            used = [reached for group in self.zero.fp32_groups_has_gradients for reached in group]
            note([param for param, reached in zip(params, used, strict=True) if not reached])
            return step(*args, **kwargs)

        self.zero.step = noted


class Stage1And2(InParts):
    """ZeRO stages 1 and 2, with and without CPU offload: one flat per parameter group."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        if self.zero.cpu_offload and not hasattr(self.zero, "accumulated_grads_in_cpu"):
            raise versions.unserved(["DeepSpeedZeroOptimizer.accumulated_grads_in_cpu"])
        self.lands = self.zero.cpu_offload and older.asked(engine, "managed_gradient_accumulation", True)

    def flats(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        # not through each parameter's _hp_mapping: under round_robin_gradients its offsets ignore the reordering
        return [
            _slice_of_flat(params, paddings, size, group, names)
            for params, paddings, size, group in zip(
                self.zero.round_robin_bit16_groups,
                older.round_robin_paddings(self.zero),
                self.numels(),
                self.zero.real_dp_process_group,
                strict=True,
            )
        ]

    def gradients(self) -> Iterator[Gradient]:
        for i, flat in reversed(list(enumerate(self.flats()))):
            if flat.grad is not None:  # offloaded, or the group about to be stepped
                yield flat, [flat.grad], None
            else:
                whole = older.preflattened(self.zero, i)
                yield flat, self.zero.averaged_gradients[i] if whole is None else [whole], None

    def parameters(self) -> list[Tensor]:
        return [param for params in self.zero.round_robin_bit16_groups for param in params]

    def stale(self, param: Tensor) -> Tensor | None:
        if not self.zero.cpu_offload:
            return None
        return self.zero.accumulated_grads_in_cpu.get(self.zero.get_param_id(param))

    def watch_gradients(self, note: Callable[[Tensor, bool, bool], None]) -> None:
        zero, taken = self.zero, set()

        def note_taken(param: Tensor, first: bool, last: bool) -> None:
            taken.add(param)
            note(param, first, last)

        super().watch_gradients(note_taken)
        reduce = zero.reduce_gradients

        @functools.wraps(reduce)
        def reduce_all(*args: Any, **kwargs: Any) -> None:
            # with overlap_comm stage 1 takes those of the last micro-batch and leaves those of earlier ones unreduced
            for i, params in enumerate(zero.bit16_groups if zero.overlap_comm else ()):
                for param in params:
                    if param not in taken and zero.get_gradient_for_reduction(param) is not None:
                        zero.reduce_ready_partitions_and_remove_grads(param, i)
            reduce(*args, **kwargs)
            taken.clear()

        zero.reduce_gradients = reduce_all

    def land(self, params: Iterable[Tensor]) -> None:
        older.land_1_and_2(self.zero, params)


def _slice_of_flat(
    params: Sequence[Tensor], paddings: Sequence[int], size: int, group: dist.ProcessGroup, names: dict[Tensor, str]
) -> list[Shard]:
    """What a rank's slice of ``size`` elements holds of parameters that follow each other, each with its padding."""
    begin, offset, held = dist.get_rank(group) * size, 0, []
    for param, padding in zip(params, paddings, strict=True):
        first, last = max(offset, begin), min(offset + param.numel(), begin + size)
        if first < last:
            part = first - offset, last - first
            at = consecutive(*part)
            held.append(Shard(names[param], part, first - begin, last - first, param.numel(), positions=at))
        offset += param.numel() + padding
    return held


class Stage3(InParts):
    """ZeRO stage 3, with and without offload: one flat per sub-group, a padded slice of each parameter in it."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._swapped = nvme.Swapped(self.zero)
        if self._swapped:
            self._swapped.load_all(engine)
        self.lands = self.zero.offload_optimizer and older.asked(engine, "managed_gradient_accumulation", True)
        if older.asked(engine, "bf16_master_weights_and_gradients", False) and not self.zero.offload_optimizer:
            for master, own in zip(self.flats(), self.zero.fp16_partitioned_groups_flat, strict=True):
                master.data = own.data  # as DeepSpeed means to, but it compares a device with its name and copies

    def flats(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def numels(self) -> list[int]:
        # not the flats' own sizes: those that lie on NVMe are empty
        return [sum(param.partition_numel() for param in params) for params in self.zero.fp16_groups]

    def shards(self, names: dict[Tensor, str]) -> list[list[Shard]]:
        by_flat = []
        for params in self.zero.fp16_groups:
            held, offset = [], 0
            for param in params:
                padded = param.partition_numel()
                start = dist.get_rank(param.ds_process_group) * padded  # AutoEP's experts have a group of their own
                numel = max(0, min(padded, param.ds_numel - start))
                if numel:
                    at = consecutive(start, numel)
                    held.append(Shard(names[param], (start, numel), offset, numel, param.ds_numel, positions=at))
                offset += padded
            by_flat.append(held)
        return by_flat

    def count_first(self) -> None:
        self._swapped.count_first()

    def gradients(self) -> Iterator[Gradient]:
        if self.zero.offload_optimizer:
            # DeepSpeed copies gradients to the CPU without waiting where the caller accumulates them itself
            deepspeed.get_accelerator().synchronize()
        for i, flat in reversed(list(enumerate(self.flats()))):
            if flat.grad is not None:
                yield flat, [flat.grad], None
            elif self._swapped.holds(i):
                with self._swapped.read(i) as (gradient, momentum):
                    yield flat, [gradient], momentum
            else:
                yield flat, self.zero.averaged_gradients[i], None
        self._swapped.go_on()

    def parameters(self) -> list[Tensor]:
        return [param for params in self.zero.fp16_groups for param in params]

    def stale(self, param: Any) -> Tensor | None:
        return getattr(self.zero, STAGE3_BUFFERS).get(param.ds_id)

    def land(self, params: Iterable[Any]) -> None:
        older.land_3(self.zero, params, getattr(self.zero, STAGE3_BUFFERS))


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


def grad_norm_of(engine: Any) -> Callable[[], float | None] | None:
    """What reads DeepSpeed's norm of the last step's gradient, unscaled and not clipped; None where it takes none."""
    if engine.optimizer is engine.basic_optimizer:
        return None

    def read() -> float | None:
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    return read


def unscale_factor(zero: Any, total_norm: Any) -> Tensor:
    """What ``unscale_and_clip_grads`` multiplies gradients by, also where the norm is invalid: what it makes of a 1."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        one = zero.fp32_partitioned_groups_flat[0].new_ones(())
        given = SimpleNamespace(loss_scale=zero.loss_scale, clip_grad=zero.clip_grad)
        given.fp32_partitioned_groups_flat = [SimpleNamespace(grad=one)]
        DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads(given, 0, total_norm)
    else:
        one = zero.single_partition_of_fp32_groups[0].new_ones(())
        DeepSpeedZeroOptimizer.unscale_and_clip_grads(zero, [one], total_norm)
    return one


def unscales_in_fp32(zero: Any, which: Any) -> bool:
    """Whether the gradients that ``unscale_and_clip_grads(which, norm)`` multiplies are fp32."""
    at_3 = isinstance(zero, DeepSpeedZeroOptimizer_Stage3)
    given = [zero.fp32_partitioned_groups_flat[which].grad] if at_3 else which
    return all(getattr(grad, "dtype", None) == torch.float32 for grad in given)
