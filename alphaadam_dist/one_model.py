"""Refuses the ways to build the optimizer in which it sees a part of the model and cannot know of the rest.

With scope="global" alpha belongs to the whole model, and in any scope so do the norm that clip_norm clips by, the T of
alpha_warmup and the norms of telemetry. Some tools build many optimizers over one model: one for each parameter,
stepped inside the backward or one after the other, or one for the parameters that a rank owns. Each would get an alpha
of its own, and no number would look wrong. With scope="layer" and none of the others a parameter's update is the same
in all these ways.
"""

import functools
import threading
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .options import FamilyOptions

ZERO_REDUNDANCY = "torch.distributed.optim.zero_redundancy_optimizer"
_THE_WAY_OUT = (
    "Build one optimizer over all parameters and call its step() after backward(), or give scope='layer' without "
    "clip_norm, alpha_warmup and telemetry: one alpha for each parameter, the same numbers however optimizers are "
    "built. To free each gradient inside the backward build one with sync='delayed' and call its "
    "step_in_backward(model)"
)


def of_the_whole(options: FamilyOptions) -> str | None:
    """The option, as in "scope='global'", for which an optimizer must know the whole model; None where none does."""
    for name, needless in (("scope", "layer"), ("clip_norm", None), ("alpha_warmup", 0), ("telemetry", False)):
        value = getattr(options, name)
        if value != needless:
            return f"{name}={value!r}"
    return None


def refuse_in_backward(kind: str, option: str) -> None:
    """Raise ValueError inside a backward: of the gradients of the whole model some are not there yet.

    ``option`` is that of ``of_the_whole``.
    """
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            f"{kind} with {option} steps inside backward() (an optimizer in backward, a hook on parameters), where the "
            f"gradients of the whole model, which {option} needs, are not known yet. {_THE_WAY_OUT}"
        )


@dataclass
class _Alone:
    """A parameter that has an optimizer to itself, and two of its gradients: (the tensor, its version)."""

    kind: str
    name: str
    stepped: tuple[weakref.ref[Tensor], int] | None = None  # the last one that it was stepped with
    waiting: tuple[weakref.ref[Tensor], int] | None = None  # one that was there, unused, when another was stepped


class _OfThisThread(threading.local):
    """Ranks may be threads, each with a model of its own."""

    def __init__(self) -> None:
        self.alone: MutableMapping[Tensor, _Alone] = WeakTensorKeyDictionary()
        self.by_zero_redundancy = False  # which is building optimizers now


_here = _OfThisThread()


def refuse_one_per_parameter(kind: str, option: str, name: str, param: Tensor) -> None:
    """Raise ValueError where this parameter and another, each with an optimizer to itself, are parts of one model.

    Two optimizers of one parameter each are no fault by themselves: two models that a test compares, the two players
    of a game, a model that is gone. What gives parts of one model away is that their gradients come together and are
    then used up one after the other: this parameter's gradient was there, untouched since, when the other was stepped.
    Whoever trains models in turn calls backward between the steps. Whoever compares two models may not, but compares
    like with like, so parameters of equal name and shape are let be; the parameters of a model are not all alike. The
    first step has no momentum and so no conflict: it is right in any case, and the second one finds the fault.
    """
    grad = param.grad
    if grad is None:
        return
    now = weakref.ref(grad), _version(grad)
    mine = _here.alone.setdefault(param, _Alone(kind, name))
    mine.kind, mine.name = kind, name
    if mine.waiting is not None and _same(mine.waiting, grad):
        raise ValueError(
            f"this {kind} with {option} has one parameter ({name}, shape {tuple(param.shape)}), and another one has "
            "another of the same backward(): each would take from one parameter what is the whole model's. "
            f"{_THE_WAY_OUT}"
        )
    mine.stepped = now
    for other, theirs in _here.alone.items():
        if theirs.kind != kind or (theirs.name, other.shape) == (name, param.shape) or other.grad is None:
            continue
        if theirs.stepped is None or not _same(theirs.stepped, other.grad):
            theirs.waiting = weakref.ref(other.grad), _version(other.grad)


def _same(noted: tuple[weakref.ref[Tensor], int], grad: Tensor) -> bool:
    tensor, version = noted
    return tensor() is grad and version == _version(grad)


def _version(grad: Tensor) -> int:
    return 0 if grad.is_inference() else grad._version


def watch_zero_redundancy(module: ModuleType) -> None:
    """Note when torch's ZeroRedundancyOptimizer builds its local optimizers. Mutates the class, once."""
    init = module.ZeroRedundancyOptimizer.__init__
    if getattr(init, "alphaadam", False):
        return

    @functools.wraps(init)
    def noted(*args: Any, **kwargs: Any) -> None:
        _here.by_zero_redundancy = True
        try:
            init(*args, **kwargs)
        finally:
            _here.by_zero_redundancy = False

    noted.alphaadam = True  # type: ignore[attr-defined]
    module.ZeroRedundancyOptimizer.__init__ = noted


def refuse_zero_redundancy(kind: str) -> None:
    """Raise ValueError where torch's ZeroRedundancyOptimizer is building the optimizer that calls this.

    It gives each rank an optimizer over some of the parameters and says nothing of the others.
    """
    if _here.by_zero_redundancy:
        raise ValueError(
            f"ZeroRedundancyOptimizer(optimizer_class={kind}) is not served: each rank would get an alpha of its "
            "own, from its own parameters. Use torch.distributed.fsdp.fully_shard(model, "
            "reshard_after_forward=False), or DeepSpeed's ZeRO stage 1, which shard the state too"
        )
