"""What older DeepSpeeds have not: names that the table of internals.py lets them lack, and what stands in for each.

Found by comparing the sources of every release from 0.15.0 to 0.19.8. Where a feature is younger than the installed
version, nobody can have asked for it.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from . import versions

SINCE = {
    "autotp_size": "0.16.4",
    "torch_autocast_dtype": "0.17.2",
    "torch_autocast_enabled": "0.17.2",
    "zenflow_config": "0.17.5",
    "super_offload": "0.18.0",
    "bf16_master_weights_and_gradients": "0.18.3",
    "bf16_optimizer_states": "0.18.3",
    "_configure_master_weights": "0.18.3",
    "_get_preflattened_grad_partition": "0.19.2",
    "managed_gradient_accumulation": "0.19.4",
    "is_gradient_accumulation_boundary": "0.19.5",
    "_finalize_cpu_offload_gradient_accumulation": "0.19.5",
    "_finalize_offload_gradient_accumulation": "0.19.5",
    "_offload_boundary_param_ids": "0.19.5",
    "round_robin_bit16_padding": "0.19.7",
}
"""The first release with each name."""


def may_lack(name: str) -> bool:
    """The imported DeepSpeed is older than this name."""
    return name in SINCE and versions.before(SINCE[name])


def asked(engine: Any, name: str, otherwise: Any) -> Any:
    """``engine.name()``; ``otherwise`` where the feature is younger than the engine."""
    return getattr(engine, name)() if hasattr(engine, name) else otherwise


def loads_universal_at_3() -> bool:
    """A universal checkpoint of stage 3 fills all flats, by the rank in the group. Before 0.18.0 only the first."""
    return not versions.before("0.18.0")


def at_boundary(zero: Any) -> bool:
    """The micro-batch is the last of its step; a method since 0.19.5, an attribute before."""
    boundary = zero.is_gradient_accumulation_boundary
    return bool(boundary() if callable(boundary) else boundary)


def round_robin_paddings(zero: Any) -> list[list[int]]:
    """Padding behind each parameter of each group of stages 1 and 2; there was none before 0.19.7."""
    if hasattr(zero, "round_robin_bit16_padding"):
        return list(zero.round_robin_bit16_padding)
    return [[0] * len(params) for params in zero.round_robin_bit16_groups]


def preflattened(zero: Any, group: int) -> Tensor | None:
    """The gradient of a group of stages 1 and 2 as one tensor, where DeepSpeed keeps it so; never before 0.19.2."""
    find = getattr(zero, "_get_preflattened_grad_partition", None)
    return None if find is None else find(group)


def land_1_and_2(zero: Any, params: Iterable[Tensor]) -> None:
    """Bring sums of gradients to the offloaded flats, as these do with the last micro-batch's. Mutates the flats."""
    if not may_lack("_finalize_cpu_offload_gradient_accumulation"):
        zero._offload_accumulated_param_ids = {zero.get_param_id(param) for param in params}
        zero._finalize_cpu_offload_gradient_accumulation()
        return
    for param in params:
        key = zero.get_param_id(param)
        if key not in zero.grad_position:
            continue  # in no flat of this rank
        _, source, _, numel = zero.grad_position[key]
        held = zero.accumulated_grads_in_cpu[key].view(-1)
        whole = held if held.numel() == param.numel() else held.new_zeros(param.numel())
        if whole is not held:
            whole[source : source + numel] = held
        attribute = "grad_accum" if zero.use_grad_accum_attribute else "grad"
        setattr(param, attribute, whole.to(param.device, param.dtype).view_as(param))
        zero.set_norm_for_param_grad_in_gpu(param)
        zero.update_overflow_tracker_for_param_grad(param)
        zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu(param)


def land_3(zero: Any, params: Iterable[Any], buffers: dict[int, Tensor]) -> None:
    """The same at stage 3, from its buffers by ``ds_id``."""
    if not may_lack("_finalize_offload_gradient_accumulation"):
        zero._offload_boundary_param_ids = {param.ds_id for param in params}
        zero._finalize_offload_gradient_accumulation()
        return
    for param in params:
        gradient = buffers[param.ds_id]
        group, offset, _ = zero.grad_position[zero.get_param_id(param)]
        zero.norm_for_param_grads[zero.get_param_id(param)] = zero._constant_buffered_norm2(gradient)
        flat = zero.fp32_partitioned_groups_flat[group]
        if zero._swappable_optimizer_subgroup(group):
            zero.optimizer_swapper.swap_out_gradients(
                parameter=flat, gradient_offsets=[offset], gradient_tensors=[gradient.float()]
            )
        else:
            flat.grad.narrow(0, offset, gradient.numel()).copy_(gradient)
