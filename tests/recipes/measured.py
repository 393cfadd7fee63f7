"""Bytes of tensors that are alive on this rank while the optimizer steps, under DeepSpeed and FSDP2."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from alphaadam_dist import AlphaAdam


def storages() -> dict[int, int]:
    """The size in bytes of the memory of every tensor that Python can reach, by its address."""
    gc.collect()  # what nobody holds any more is not what training takes
    tensors = [found for found in gc.get_objects() if isinstance(found, Tensor)]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    found = {}
    for tensor in local:
        if tensor.device.type == "cpu" and not tensor.is_sparse:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def llama() -> nn.Module:
    """A Llama of 0.6 million parameters, so that what is not model state is small beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_adapters() -> nn.Module:
    """That Llama frozen in bf16, under LoRA of rank 8 on its linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0)
    return get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=True)


def _watched(optimizer: Any, before: dict[int, int]) -> list[int]:
    """What is alive beyond ``before`` whenever the optimizer begins a step: filled as it steps."""
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(sum(size for address, size in storages().items() if address not in before))

    optimizer.register_step_pre_hook(look)
    return seen


def _steps(model: Any, backward: Callable[[Tensor], Any], step: Callable[[], Any]) -> None:
    tokens = torch.arange(16)[None]
    for _ in range(2):
        backward(model(input_ids=tokens, labels=tokens).loss)
        step()


SUB_GROUP = 60_000
BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def under_zero(stage: int, offload: bool, make: Callable[[], nn.Module] = llama, state_dtype: str | None = None) -> int:
    """The most bytes alive at the beginning of the second step, whose moments exist."""
    before = storages()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True} if state_dtype is None else BF16,
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "overlap_comm": False,
            "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0,
        },
        "optimizer": {"type": "AlphaAdam", "params": {"lr": 1e-3, "state_dtype": state_dtype}},
    }  # fmt: skip
    if stage == 3 and state_dtype is not None:
        config["zero_optimization"]["sub_group_size"] = SUB_GROUP
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        config["zero_force_ds_cpu_optimizer"] = False
    model = make()
    trained = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    seen = _watched(engine.basic_optimizer, before)
    _steps(engine, engine.backward, engine.step)
    engine.destroy()
    return max(seen[len(seen) // 2 :])


def under_fsdp2(state_dtype: str | None = None) -> int:
    """The same under FSDP2, as Accelerate does it: fp32 shards, bf16 in forward and backward; or all in bf16."""
    before = storages()
    model = llama() if state_dtype is None else llama().bfloat16()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = AlphaAdam(model.named_parameters(), lr=1e-3, state_dtype=state_dtype)
    seen = _watched(optimizer, before)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    _steps(model, Tensor.backward, step)
    return seen[-1]


def all_of_it(adapters: bool = False) -> dict[str, int]:
    """By the names that the plan has for them."""
    make = with_adapters if adapters else llama
    result = {} if adapters else {"FSDP2": under_fsdp2()}  # FSDP2 takes no module of two dtypes
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
        result[f"ZeRO-{stage}{', CPU offload' if offload else ''}"] = under_zero(stage, offload, make)
    return result


def in_bf16() -> dict[str, int]:
    """The same with bf16 state and bf16 parameters."""
    result = {"FSDP2": under_fsdp2("bfloat16")}
    for stage, offload in ((1, False), (2, False), (3, False), (3, True)):
        result[f"ZeRO-{stage}{', CPU offload' if offload else ''}"] = under_zero(stage, offload, state_dtype="bfloat16")
    return result
