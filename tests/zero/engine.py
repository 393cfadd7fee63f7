"""Runs a model under DeepSpeed on every rank of a pool, and the same without DeepSpeed in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

import alphaadam_dist  # registers its optimizers with DeepSpeed
from alphaadam_dist import AlphaAdam
from alphaadam_dist.optimizer import AlphaOptimizer
from tests.models import Given, decay_groups, given_gradients, tiny_llama, token_batches

LR = 1e-2


def config(stage: int, dtype: str = "fp32", accumulate: int = 1, **zero: Any) -> dict[str, Any]:
    """A DeepSpeed config without an optimizer. Unnamed clipping would be 1.0, so it is named."""
    offload = zero.pop("offload", False)
    if stage == 3:
        zero = {"stage3_param_persistence_threshold": 0, **zero}
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": False}, "zero_force_ds_cpu_optimizer": False}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **zero},
    }
    if offload:
        result["zero_force_ds_cpu_optimizer"] = result["zero_optimization"].pop("zero_force_ds_cpu_optimizer")
    if dtype == "bf16":
        result["bf16"] = {"enabled": True}
    if dtype == "fp16":
        result["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000, "hysteresis": 1}
    return result


def offload(stage: int, **settings: Any) -> dict[str, Any]:
    """A config with the optimizer on the CPU, and more settings of ``offload_optimizer``."""
    result = config(stage, offload=True)
    result["zero_optimization"]["offload_optimizer"] |= settings
    return result


def start(model: nn.Module, ds_config: dict[str, Any], options: dict[str, Any], client: bool, optimizer: str,
          **arguments: Any) -> Any:  # fmt: skip
    """The engine: the optimizer named in the JSON, or built by the client with two parameter groups.

    ``arguments`` are deepspeed.initialize's own.
    """
    # DeepSpeed allows fp16 only on CPUs that multiply it fast; torch computes it on all.
    get_accelerator().is_fp16_supported = lambda: True
    options = {"lr": LR, **options}
    ds_config = copy.deepcopy(ds_config)
    params: Any = None
    if client:
        params = {"optimizer": getattr(alphaadam_dist, optimizer, torch.optim.AdamW)(decay_groups(model), **options)}
    else:
        extra = {"torch_adam": True} if optimizer == "AdamW" else {}
        ds_config["optimizer"] = {"type": optimizer, "params": {"weight_decay": 0.1, **options, **extra}}
        params = {"model_parameters": [p for p in model.parameters() if p.requires_grad]}
    engine, *_ = deepspeed.initialize(model=model, config=ds_config, **params, **arguments)
    return engine


def gathered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module and its children, in its own forward: stage 3 gathers each when it is asked for."""
    for name, param in list(module.named_parameters()):
        if hasattr(param, "ds_id"):
            deepspeed.zero.register_external_parameter(module, param)
        owner, _, last = name.rpartition(".")
        yield name, getattr(module.get_submodule(owner), last)


def observe(optimizer: Any) -> tuple[Any, Any]:
    return (optimizer.alpha, optimizer.agreement) if isinstance(optimizer, AlphaOptimizer) else (None, None)


def masters(engine: Any) -> dict[str, Tensor]:
    """The whole fp32 parameters that the optimizer steps, by name, on every rank."""
    result = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            if engine.zero_optimization_stage() == 0:
                full = stage_zero_master(engine, param)
            elif engine.zero_optimization_stage() < 3 and param.dtype == getattr(
                engine.optimizer, "master_weights_and_grads_dtype", torch.float32
            ):
                full = param  # it has the master's values, and safe_get_* is wrong under round_robin_gradients
            else:
                full = safe_get_full_fp32_param(param)
            result[name] = full.detach().float().clone()
    return result


def loss_scale(engine: Any) -> float:
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def stage_zero_master(engine: Any, param: Tensor) -> Tensor:
    if engine.optimizer is engine.basic_optimizer:
        return param
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return next(master for low, high in pairs for p, master in zip(low, high, strict=True) if p is param)


def given(ds_config: dict[str, Any], options: dict[str, Any], *, steps: int = 10, client: bool = True,
          optimizer: str = "AlphaAdam", count_collectives: bool = False, shrink: float = 1.0,
          overflow_at: tuple[int, ...] = (), model: type[Given] = Given,
          **arguments: Any) -> dict[str, Any]:  # fmt: skip
    """Steps with given gradients under DeepSpeed, equal on all ranks; times ``shrink``, and infinite at some steps.

    ``arguments`` are deepspeed.initialize's own.
    """
    engine = start(model(), ds_config, options, client, optimizer, **arguments)
    accumulate = engine.gradient_accumulation_steps()
    seen, collectives, scales = [], [], []
    for step, gradients in enumerate(given_gradients(steps, like=model())):
        factor = float("inf") if step in overflow_at else shrink
        scale_before = loss_scale(engine)
        gradients = {name: gradient * factor for name, gradient in gradients.items()}
        for _ in range(accumulate):
            loss = engine(gradients)
            engine.backward(loss)
            if count_collectives:
                with Collectives() as counted:
                    engine.step()
                collectives.append(counted.sizes)
            else:
                engine.step()
        seen.append(observe(engine.basic_optimizer))
        scales.append((scale_before, loss_scale(engine)))
    result = {"params": masters(engine), "seen": seen, "collectives": collectives, "skipped": engine.skipped_steps}
    result["scales"] = scales
    engine.destroy()
    return result


def given_alone(options: dict[str, Any], *, steps: int = 10, client: bool = True, clip: float = 0.0,
                optimizer: type[AlphaOptimizer] = AlphaAdam, dtype: torch.dtype = torch.float32,
                shrink: float | list[float] = 1.0, overflow_at: tuple[int, ...] = (),
                masters: torch.dtype = torch.float32, model: type[Given] = Given) -> dict[str, Any]:  # fmt: skip
    """The same in one process on masters of a model in dtype, clipping by DeepSpeed's float operations."""
    whole = model().to(dtype).to(masters)
    if client:
        alone = optimizer(decay_groups(whole), **{"lr": LR, **options})
    else:
        trainable = [(n, p) for n, p in whole.named_parameters() if p.requires_grad]
        alone = optimizer(trainable, **{"lr": LR, "weight_decay": 0.1, **options})
    seen = []
    shrinks = shrink if isinstance(shrink, list) else [shrink] * steps
    for step, (gradients, factor) in enumerate(zip(given_gradients(steps, like=model()), shrinks, strict=True)):
        if step in overflow_at:
            seen.append(observe(alone))
            continue
        for name, param in whole.named_parameters():
            if param.requires_grad:
                param.grad = (gradients[name] * factor).to(masters)
        if clip:
            norm = torch.stack([(g * factor).double().square().sum() for g in gradients.values()]).sum().sqrt().float()
            coefficient = 1.0 / ((norm + 1e-6) / clip).clamp(min=1.0)
            for param in whole.parameters():
                if param.grad is not None:
                    param.grad.mul_(coefficient)
        alone.step()
        seen.append(observe(alone))
    params = {n: p.detach().float().clone() for n, p in whole.named_parameters() if p.requires_grad}
    return {"params": params, "seen": seen}


def train(ds_config: dict[str, Any], options: dict[str, Any], *, steps: int = 20, optimizer: str = "AlphaAdam",
          tied: bool = False, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """A tiny Llama under DeepSpeed, every rank on its share of each batch of 4."""
    engine = start(tiny_llama(seed, tied), ds_config, options, True, optimizer)
    rank, world = dist.get_rank(), dist.get_world_size()
    seen = []
    for batch in token_batches(steps, 4, seed=2 + seed):
        mine = batch.chunk(world)[rank]
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()
        seen.append(observe(engine.basic_optimizer))
    result = {"params": masters(engine), "seen": seen}
    engine.destroy()
    return result


def train_alone(options: dict[str, Any], *, steps: int = 20, optimizer: type = AlphaAdam,
                tied: bool = False, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """The same in one process, on whole batches."""
    model = tiny_llama(seed, tied)
    alone = optimizer(decay_groups(model), **{"lr": LR, **options})
    seen = []
    for batch in token_batches(steps, 4, seed=2 + seed):
        model(input_ids=batch, labels=batch).loss.backward()
        alone.step()
        alone.zero_grad()
        seen.append(observe(alone))
    return {"params": {n: p.detach().clone() for n, p in model.named_parameters()}, "seen": seen}


class Collectives:
    """Records the bytes of every collective that torch.distributed is asked for, by whoever."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce")

    def __enter__(self) -> Collectives:
        self.sizes: list[tuple[str, int]] = []
        self._original = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self._original.items():
            setattr(dist, name, self._recording(name, original))
        return self

    def _recording(self, name: str, original: Any) -> Any:
        def recorded(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            first = tensor[0] if isinstance(tensor, list) else tensor
            self.sizes.append((name, first.numel() * first.element_size()))
            return original(tensor, *args, **kwargs)

        return recorded

    def __exit__(self, *_: Any) -> None:
        for name, original in self._original.items():
            setattr(dist, name, original)
