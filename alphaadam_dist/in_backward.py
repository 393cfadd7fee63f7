"""The step inside the backward: each parameter steps as its gradient arrives, and the gradient is freed.

With ``sync="delayed"`` alpha is known before the backward begins, so no parameter has to wait for the others. The
hooks are torch's post-accumulate-grad hooks, which FSDP2 calls after its reduce-scatter. DDP averages gradients after
these hooks: there all parameters step when the backward ends, and so does any that no hook announced.
"""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from . import parameters
from .eager import eager
from .layout import Layout
from .persistence import Persistent
from .shards import fsdp1
from .step import Step
from .tensors import is_dtensor


class StepInBackward:
    """Steps an optimizer in every backward, until ``remove()``. The optimizer holds it while it is at work.

    Collective where the model is sharded, as the first step is.

    Args:
        optimizer: whose parameters step.
        model: the module that holds all of them, as DDP or FSDP2 wraps it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the result would not be that of step(): an option, a wrapper or a parameter is not served.
        RuntimeError: the optimizer steps in backward already.
    """

    def __init__(self, optimizer: Persistent, model: Module) -> None:
        _refuse(optimizer, model)
        self._owner = weakref.ref(optimizer)  # hooks live as long as parameters: they must not keep it alive
        self._reducers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self._by_fsdp = any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())
        # now, where all ranks are at one place, and not in the first backward
        optimizer._run.layout = parameters.current_layout(optimizer)
        _refuse_unreduced(optimizer, self._reducers, optimizer._run.layout, by_fsdp=self._by_fsdp)
        self._lock = threading.RLock()  # a model on several devices has a thread of the backward for each
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._streams: dict[torch.device, torch.Stream] = {}  # where the last kernel of each device was started
        self._backward: weakref.ref[Callable[[], None]] | None = None  # what ends the open step; gone if that failed
        self._step: Step | None = None
        self._stepped: set[Tensor] = set()  # in the open step
        self._taken = False  # a step that step() has not ended
        self._removed = False
        self._follow(optimizer)
        optimizer._run.in_backward = self

    def remove(self) -> None:
        """From now on gradients stay, and step() takes the step. A step that was taken still waits for its step().

        Raises RuntimeError inside a backward.
        """
        if self._backward is not None and self._backward() is not None:
            raise RuntimeError("remove() inside the backward that it would cut in two: call it between steps")
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._groups, self._removed = {}, {}, True
        optimizer = self._owner()
        if optimizer is not None and optimizer._run.in_backward is self and not self._taken:
            optimizer._run.in_backward = None

    @torch.no_grad()
    def end(self, optimizer: Persistent) -> bool:
        """step() was called: whether the backward before it took the step, so that nothing is left to do.

        ``optimizer`` may be a wrapper of it. Raises RuntimeError where that step was no whole one, or not the right
        one.
        """
        if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "a GradScaler calls step() of an optimizer that steps in backward: its gradients were stepped with "
                "before the scaler could unscale them, so the parameters are wrong. Train in bf16 without a scaler, or "
                "without step_in_backward, from the last checkpoint"
            )
        if self._backward is not None:
            raise _unfinished(self._backward() is None)
        taken, self._taken = self._taken, False
        if not taken:
            self._follow(optimizer)
            return False
        if self._removed:
            optimizer._run.in_backward = None
        else:
            self._follow(optimizer)
        self._refuse_gradients(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
        return True

    def _follow(self, optimizer: Persistent) -> None:
        """Hook the trainable parameters that the optimizer has now, and no others."""
        self._groups = {param: group for group in optimizer.param_groups for param in group["params"]}
        for param in [param for param in self._hooks if param not in self._groups]:
            self._hooks.pop(param).remove()
        for param in self._groups:
            if param.requires_grad and param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(self._arrived)

    @eager
    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        """The gradient of a parameter is there: step it, unless somebody works on the gradient until the end."""
        optimizer = self._owner()
        if optimizer is None or self._removed:
            return
        with self._lock:
            self._begin(optimizer)
            if self._reducers or _offloaded(param):
                return
            if param in self._stepped:
                raise RuntimeError(
                    f"parameter {_name(optimizer, param)!r} got a second gradient in one backward, after it had been "
                    "stepped with the first: a module that is used several times under FSDP2, or under activation "
                    "checkpointing with use_reentrant=True. Give use_reentrant=False, or call step() after backward"
                )
            step = self._opened(optimizer)
            self._in_order(optimizer, [param])
            step.update([(self._groups[param], [param])])
            self._stepped.add(param)
            param.grad = None

    def _begin(self, optimizer: Persistent) -> None:
        """Have the engine call back at the end of this backward, if it is a new one."""
        if self._backward is not None:
            if self._backward() is None:
                raise _unfinished(failed=True)
            return
        if getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False):
            raise RuntimeError(
                "step_in_backward under compiled autograd: a backward that is compiled as a whole has no end at which "
                "the step could end. Set torch._dynamo.config.compiled_autograd=False (a compiled model is served), or "
                "call step() after backward without step_in_backward"
            )
        if self._taken:
            raise RuntimeError(
                "a second backward() before the step() of the first, in which the parameters were stepped already: "
                "step_in_backward has no gradient accumulation. Call step() after every backward, accumulate by a "
                "larger batch, or call step() after backward without step_in_backward. (One backward looks like two "
                "under activation checkpointing with use_reentrant=True: give use_reentrant=False.)"
            )
        if any(not reducer.require_forward_param_sync for reducer in self._reducers):
            raise RuntimeError(
                "a backward under DistributedDataParallel.no_sync(), whose gradients are of this rank alone: "
                "step_in_backward has no gradient accumulation. Leave no_sync(), or call step() after backward"
            )
        _refuse_options(optimizer)
        self._follow(optimizer)
        self._stepped.clear()
        self._end_by(self._end_after_others if self._reducers or self._by_fsdp else self._finish)

    def _end_by(self, act: Callable[[], None]) -> None:
        def end() -> None:
            act()

        # the engine alone holds it, and drops it when a backward fails
        self._backward = weakref.ref(end)
        Variable._execution_engine.queue_callback(end)

    def _end_after_others(self) -> None:
        # DDP's callbacks and those of each root of FSDP2, which bring gradients, were queued during the backward
        self._end_by(self._finish)

    @eager
    @torch.no_grad()
    def _finish(self) -> None:
        """The backward is over: step what has a gradient still, and close the step."""
        optimizer = self._owner()
        self._backward = None
        if optimizer is None:
            return
        step, stepped = self._opened(optimizer), list(self._stepped)
        self._step = None
        self._stepped.clear()
        self._refuse_gradients(optimizer, stepped)
        self._in_order(optimizer, self._groups)
        step.update()
        for param in self._groups:
            param.grad = None
        step.close()
        self._taken = True

    def _opened(self, optimizer: Persistent) -> Step:
        if self._step is None:
            layout = parameters.current_layout(optimizer)
            _refuse_unreduced(optimizer, self._reducers, layout, by_fsdp=self._by_fsdp)
            self._in_order(optimizer, [])
            self._step = Step(optimizer, layout)
        return self._step

    def _in_order(self, optimizer: Persistent, params: Iterable[Tensor]) -> None:
        """Steps of parameters add to one buffer: what is started now on a device waits for what was before.

        FSDP2 calls the hooks in a stream of its own.
        """
        layout = optimizer._run.layout
        devices = {param.device for param in params} | ({layout.device} if layout is not None else set())
        for device in devices:
            if device.type in ("cpu", "meta"):
                continue
            stream = torch.accelerator.current_stream(device)
            before = self._streams.get(device)
            if before is not None and before != stream:
                stream.wait_stream(before)
            self._streams[device] = stream

    def _refuse_gradients(self, optimizer: Persistent, params: list[Tensor]) -> None:
        """Raise RuntimeError where one of these, which have been stepped, has a gradient again."""
        param = next((param for param in params if param.grad is not None), None)
        if param is not None:
            raise RuntimeError(
                f"parameter {_name(optimizer, param)!r} has a gradient after it was stepped in the backward: whoever "
                "wrote it came too late. Give step_in_backward the model as DistributedDataParallel wraps it, let "
                "nobody else write gradients after backward, or call step() after backward without it"
            )


def _name(optimizer: Persistent, param: Tensor) -> str:
    return next(name for name, one in parameters.named(optimizer.param_groups) if one is param)


def _offloaded(param: Tensor) -> bool:
    """FSDP2 keeps it on the CPU: older versions call the hooks while the gradient is on its way there."""
    return is_dtensor(param) and param.device.type != param.device_mesh.device_type


def _unfinished(failed: bool) -> RuntimeError:
    if not failed:
        return RuntimeError("step() inside the backward that takes the step: call it after backward()")
    return RuntimeError(
        "the last backward() failed in the middle, where some parameters had been stepped and others not: load a "
        "checkpoint of the model and the optimizer, then remove() what step_in_backward returned and call it again"
    )


# ---- what is not served ---------------------------------------------------------------------------------------------


def _refuse(optimizer: Persistent, model: Module) -> None:
    """Raise where a model's parameters cannot step in the backward. Warn where some would not."""
    kind = type(optimizer).__name__
    if not isinstance(model, Module):
        raise TypeError(
            f"step_in_backward(model={type(model).__name__}): give the module that holds the parameters, as DDP or "
            "FSDP2 wraps it"
        )
    if optimizer._run.in_backward is not None:
        raise RuntimeError(
            f"this {kind} steps in backward already: call step() where a backward has been, then remove() of what the "
            "first step_in_backward returned"
        )
    if optimizer._run.driver is not None:
        raise ValueError(
            "step_in_backward under DeepSpeed is not served: ZeRO keeps gradients in buffers of its own and steps when "
            "all have been reduced. Shard with FSDP2 (torch.distributed.fsdp.fully_shard), or leave it out"
        )
    _refuse_options(optimizer)
    held = set(model.parameters())
    for name, param in parameters.named(optimizer.param_groups):
        if fsdp1.marked(param):
            raise ValueError(
                f"parameter {name!r} is a shard of FSDP1, whose gradients come in pieces when the backward ends: "
                "step_in_backward takes FSDP2 (torch.distributed.fsdp.fully_shard), or call step() after backward"
            )
        if param not in held and param.requires_grad:
            raise ValueError(
                f"parameter {name!r} of the optimizer is none of the model's, so nobody can tell who averages its "
                "gradient: build the optimizer after all that wraps the model, and give step_in_backward the module "
                "that holds all parameters, as in nn.ModuleList([model, head])"
            )
    for module in model.modules():
        clip = getattr(getattr(module, "_trainer", None), "gradient_clip_val", None)
        if clip:
            raise ValueError(
                f"Lightning's Trainer(gradient_clip_val={clip!r}) with step_in_backward: the gradients are stepped and "
                "freed before the Trainer could clip them. Leave one of them out"
            )
    ours = {param for group in optimizer.param_groups for param in group["params"]}
    others = sum(param.requires_grad for param in held - ours)
    if others:
        warnings.warn(
            f"step_in_backward: {others} trainable parameters of the model are not this {kind}'s. They are not "
            "stepped, their gradients stay in memory, and alpha does not count them",
            stacklevel=3,
        )


def _refuse_options(optimizer: Persistent) -> None:
    """Raise ValueError where a step needs the gradients of the whole model before it can begin."""
    optimizer._adopt()  # somebody may have changed the defaults
    options = optimizer._run.options
    if not options.reads_first:
        return
    asked = {"clip_norm": options.clip_norm, "skip_nonfinite": options.skip_nonfinite or None}
    name, value = next(((name, value) for name, value in asked.items() if value is not None), ("sync", "exact"))
    needs, also = f"{name}={value!r}", "" if name == "sync" else f", and no {name}"
    raise ValueError(
        f"{needs} with step_in_backward: it needs the gradients of the whole model before the first parameter can "
        f"step, and they are freed one by one. Give sync='delayed'{also}, or call step() after backward"
    )


def _refuse_unreduced(
    optimizer: Persistent, reducers: list[DistributedDataParallel], layout: Layout, *, by_fsdp: bool
) -> None:
    """Raise ValueError where a plain parameter is on several ranks and nothing averages its gradient in backward.

    Tensor-parallel ranks compute equal gradients of what they hold alike. Where FSDP2 shards the model ranks have other
    batches, and what it ignores is nobody's.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if layout.group is not None and not by_fsdp:
        return
    copies = {shard.param for shard in layout.shards if layout.group is None or shard.replica_id >= 0}
    averaged = {
        param
        for reducer in reducers
        for name, param in reducer.module.named_parameters()
        if name not in reducer.parameters_to_ignore
    }
    for name, param in parameters.named(optimizer.param_groups):
        if param in copies and param.requires_grad and not is_dtensor(param) and param not in averaged:
            raise ValueError(
                f"step_in_backward on {dist.get_world_size()} ranks, several of which hold all of parameter {name!r}: "
                "nothing averages its gradient inside the backward. Give step_in_backward the model as "
                "DistributedDataParallel wraps it, or as FSDP2 shards it (without ignored_params); if gradients are "
                "averaged by hand, call step() after that, without step_in_backward"
            )
