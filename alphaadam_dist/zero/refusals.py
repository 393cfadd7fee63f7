"""What is not served under DeepSpeed: each is refused by deepspeed.initialize, with the way out."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_world_size

from ..optimizer import AlphaOptimizer
from . import older, parallel, versions

Refusal = tuple[bool, str, str]
"""Whether it is there, what it is, and what to do."""


def refuse(engine: Any, optimizer: AlphaOptimizer) -> None:
    """Raise ValueError for the first feature of this engine under which the result would not be exact."""
    for present, what, fix in chain(
        _of_the_optimizer(optimizer), _of_the_groups(engine, optimizer), _of_the_parallelism(engine, optimizer),
        _of_the_precision(engine, optimizer), _of_the_offload(engine, optimizer),
    ):  # fmt: skip
        if present:
            raise ValueError(f"{type(optimizer).__name__} under DeepSpeed does not serve {what}: {fix}")
    refuse_outside(engine, optimizer, optimizer.param_groups)


def _of_the_optimizer(optimizer: AlphaOptimizer) -> Iterator[Refusal]:
    clip_norm = optimizer.defaults["clip_norm"]
    yield (
        clip_norm is not None,
        f"optimizer.params.clip_norm={clip_norm!r}",
        "DeepSpeed clips by itself: remove clip_norm and set gradient_clipping in the DeepSpeed config",
    )
    yield (
        optimizer.defaults["skip_nonfinite"],
        "optimizer.params.skip_nonfinite=true",
        "DeepSpeed decides which steps are left out, in fp16 always and in bf16 by bf16.check_grad_overflow: remove it",
    )
    yield (
        optimizer.sharding != "auto" or optimizer.process_group is not None,
        f"sharding={optimizer.sharding!r}, process_group={optimizer.process_group!r}",
        "DeepSpeed decides how the model is sharded: leave both at their defaults",
    )
    yield (
        optimizer._run.in_backward is not None,
        "an optimizer that steps in backward",
        "ZeRO keeps gradients in buffers of its own and steps when all are reduced: leave step_in_backward out, or "
        "shard with FSDP2",
    )


def _of_the_groups(engine: Any, optimizer: AlphaOptimizer) -> Iterator[Refusal]:
    stage = engine.zero_optimization_stage()
    yield (
        stage == 1 and parallel.stages_differ(engine, len(optimizer.param_groups)),
        f"other numbers of parameter groups on other pipeline stages (here {len(optimizer.param_groups)}) at stage 1",
        "DeepSpeed adds up norms group by group over all of them, and some would wait for ever: set "
        "zero_optimization.stage to 0, or write `groups` so that each pipeline stage has parameters of every entry, "
        "and some that no entry names",
    )
    for i, group in enumerate(optimizer.param_groups):
        yield (
            stage in (1, 2) and not any(param.requires_grad for param in group["params"]),
            f"parameter group {i}, whose {len(group['params'])} parameters are frozen, at stage {stage}",
            "DeepSpeed makes a partition of the trainable ones, and there are none: leave this group, or the entry of "
            "`groups` that makes it, out",
        )


def _of_the_parallelism(engine: Any, optimizer: AlphaOptimizer) -> Iterator[Refusal]:
    mpu, stage = engine.mpu, engine.zero_optimization_stage()
    piped, by_tensor = isinstance(engine.module, PipelineModule), parallel.by_tensor(engine)
    yield (
        not piped and mpu is not None and bwc_pipeline_parallel_world_size(mpu) > 1,
        "the pipeline parallelism of a client's mpu",
        "its stages may name different parameters alike, and DeepSpeed does not say which: use DeepSpeed's "
        "PipelineModule, ZeRO-3 or FSDP2",
    )
    yield (
        not by_tensor and mpu is not None and _tensor_parallel_size(mpu) > 1,
        "the tensor parallelism of a client's mpu",
        "which parameters it splits DeepSpeed does not know: use DeepSpeed's tensor_parallel.autotp_size, or ZeRO-3",
    )
    yield (
        by_tensor and optimizer.defaults["state_dtype"] is not None,
        f"state_dtype={optimizer.defaults['state_dtype']!r} with tensor_parallel.autotp_size="
        f"{older.asked(engine, 'autotp_size', 1)!r}",
        "its random bits depend on where an element stands in the whole parameter: leave state_dtype out",
    )
    yield (
        getattr(groups, "mesh_device", None) is not None and getattr(engine, "sequence_parallel_size", 1) > 1,
        f"deepspeed.initialize(mesh_param=...) with {engine.sequence_parallel_size} sequence-parallel ranks",
        "DeepSpeed adds up the gradients of its data-parallel dimension only, and the others drift apart: give "
        "mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp after its initialize_sequence_parallel(size)",
    )
    yield (
        bool(getattr(getattr(engine._config, "compile_config", None), "deepcompile", False)),
        "compile.deepcompile=true",
        "DeepCompile steps past the hooks that count: set it to false",
    )
    yield (
        stage == 3 and any(isinstance(module, MoE) for module in engine.module.modules()),
        "DeepSpeed MoE layers with zero_optimization.stage=3",
        "nor does DeepSpeed: use stage 1 or 2, or AutoEP (expert_parallel)",
    )
    yield (
        engine.zero_elastic_checkpoint() and engine.zero_optimization_stage() > 0,
        "zero_optimization.elastic_checkpoint=true",
        "at stages 1 and 2 DeepSpeed saves no step and asks for one when it loads, and at stage 3 it supports this no "
        "longer: set it to false, and change the number of ranks through a universal checkpoint",
    )
    yield (
        engine.load_universal_checkpoint()
        and engine.zero_optimization_stage() == 3
        and not older.loads_universal_at_3(),
        f"checkpoint.load_universal=true with zero_optimization.stage=3 under DeepSpeed {versions.installed()}",
        "it would load the first parameter group only, and on a second node the first one's part: upgrade to "
        "deepspeed>=0.18.0, or set it to false and load the checkpoint as it was saved, on as many ranks",
    )


def _tensor_parallel_size(mpu: Any) -> int:
    """DeepSpeed's mpu of Ulysses calls its sequence-parallel ranks model-parallel too, where nothing is split."""
    alias = getattr(mpu, "get_sequence_parallel_world_size", None)
    if alias is not None and getattr(mpu, "get_model_parallel_world_size", None) is alias:
        return 1
    return bwc_tensor_model_parallel_world_size(mpu)


def _of_the_precision(engine: Any, optimizer: AlphaOptimizer) -> Iterator[Refusal]:
    stage = engine.zero_optimization_stage()
    yield (
        stage > 0
        and older.asked(engine, "torch_autocast_enabled", False)
        and engine.torch_autocast_dtype() == torch.float16,
        f"torch_autocast with dtype float16 at stage {stage}",
        "DeepSpeed clips gradients before its GradScaler has unscaled them, and lowers the scale at no overflow: use "
        "dtype bfloat16, the fp16 section, or stage 0",
    )
    yield (
        engine.fp16_master_weights_and_gradients(),
        "fp16.fp16_master_weights_and_grads=true",
        "fp16 moments lose the gradients' signs: set it to false",
    )
    yield from _of_the_masters(engine, optimizer.defaults)


def _of_the_masters(engine: Any, options: Mapping[str, Any]) -> Iterator[Refusal]:
    """bf16 masters: DeepSpeed's flags and the optimizer's own option must say the same."""
    masters = older.asked(engine, "bf16_master_weights_and_gradients", False)
    states = older.asked(engine, "bf16_optimizer_states", False)
    yield (
        masters and not states,
        "bf16.bf16_master_weights_and_grads=true with bf16.bf16_optimizer_states=false",
        "DeepSpeed takes that with its own CPU Adam only: set bf16_optimizer_states to true as well, or both to false",
    )
    yield (
        states and options["state_dtype"] is None,
        "bf16.bf16_optimizer_states=true with state_dtype=None",
        'without stochastic rounding bf16 parameters and moments stop following the gradients: give "state_dtype": '
        '"bfloat16" to the optimizer, or set both flags to false',
    )
    yield (
        masters and options["threshold"] > 0 and engine.gradient_clipping() > 0,
        f"bf16.bf16_master_weights_and_grads=true with threshold={options['threshold']!r} and "
        f"gradient_clipping={engine.gradient_clipping()!r}",
        "DeepSpeed rounds clipped gradients to bf16 after they were counted: set threshold or gradient_clipping to 0",
    )


def _of_the_offload(engine: Any, optimizer: AlphaOptimizer) -> Iterator[Refusal]:
    offload = engine.zero_offload_optimizer()
    yield (
        older.asked(engine, "super_offload", False),
        "zero_optimization.offload_optimizer.super_offload=true",
        "it runs DeepSpeed's own CPU Adam: set it to false",
    )
    yield (
        older.asked(engine, "zenflow_config", None) is not None,
        "zero_optimization.zenflow",
        "it updates some columns at other times than the rest: remove the section",
    )
    yield (
        engine.zero_partial_offload() < 1.0,
        f"zero_optimization.offload_optimizer.ratio={engine.zero_partial_offload()!r}",
        "DeepSpeed steps the part that stays on the GPU with an AdamW of its own, and for the rest it takes only its "
        "DeepSpeedCPUAdam: set ratio to 1.0",
    )
    yield (
        offload is not None and offload.device == "nvme" and optimizer.defaults["state_dtype"] is not None,
        f"zero_optimization.offload_optimizer.device='nvme' with state_dtype={optimizer.defaults['state_dtype']!r}",
        "DeepSpeed swaps moments in buffers of the masters' dtype: leave state_dtype out, or offload to 'cpu'",
    )


def refuse_outside(engine: Any, optimizer: AlphaOptimizer, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError for a parameter in these groups that DeepSpeed does not know or would not average."""
    if engine.zero_optimization_stage() == 0 and dist.get_world_size(engine.seq_data_parallel_group) == 1:
        return
    inside = set(engine.module.parameters())
    for group in groups:
        for i, param in enumerate(group["params"]):
            if param not in inside:
                name = group["param_names"][i] if "param_names" in group else f"number {i} of its group"
                raise ValueError(
                    f"{type(optimizer).__name__} under DeepSpeed does not serve a parameter outside the engine's "
                    f"module ({name}, of shape {tuple(param.shape)}): DeepSpeed averages the gradients of the module's "
                    "parameters only. Make it one of them, as in self.temperature = nn.Parameter(...)"
                )
