"""What the unit tests share: problems with given gradients, bit comparison, and an optimizer beside the rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from alphaadam_dist import AlphaAdam, rule
from alphaadam_dist.optimizer import AlphaOptimizer

SHAPES: tuple[tuple[int, ...], ...] = ((7, 5), (13,), (1,), (), (0,), (2, 3, 4))
INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Cast(Tensor):
    """A weight that multiplies in another way: it wraps a tensor that holds its values, and perhaps one more number."""

    @staticmethod
    def __new__(cls, held: Tensor, scale: Tensor | None = None) -> Cast:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return]
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=held.device
        )

    def __init__(self, held: Tensor, scale: Tensor | None = None) -> None:
        self.held, self.scale = held, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"] if self.scale is None else ["held", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Cast:
        return Cast(inner["held"], inner.get("scale"))

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Cast, lambda cast: cast.held, (args, kwargs or {}))
        result = operator(*args, **kwargs)
        return Cast(result) if operator in (torch.ops.aten.detach.default, torch.ops.aten.view.default) else result


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits: -0.0 is not 0.0, and a NaN is itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    as_int = INTS[a.element_size()]
    return torch.equal(a.detach().contiguous().view(as_int), b.detach().contiguous().view(as_int))


def tensors(seed: int, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradients(
    steps: int,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    *,
    seed: int = 1,
    absent: float = 0.0,
) -> list[list[Tensor | None]]:
    """For each step gradients that drift, so that some signs persist; a tenth are 0; a share ``absent`` is None."""
    generator = torch.Generator().manual_seed(seed)
    drift = [torch.randn(shape, generator=generator) for shape in shapes]
    result: list[list[Tensor | None]] = []
    for _ in range(steps):
        step: list[Tensor | None] = []
        for mean in drift:
            grad = 0.5 * mean + torch.randn(mean.shape, generator=generator)
            grad = torch.where(torch.rand(mean.shape, generator=generator) < 0.1, 0.0, grad).to(dtype)
            step.append(None if float(torch.rand((), generator=generator)) < absent else grad)
        result.append(step)
    return result


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step_with(optimizer: torch.optim.Optimizer, grads: Sequence[Tensor | None]) -> None:
    """One step with these gradients, in the order of the parameter groups."""
    for param, grad in zip(parameters_of(optimizer), grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    optimizer.step()


def memory_of(optimizer: AlphaOptimizer) -> list[float]:
    """[T, alpha, A, C] as a checkpoint would hold it."""
    held: list[float] = optimizer.state_dict()["param_groups"][0]["alphaadam_state"]
    return held


class Twin:
    """An optimizer and rule.step_ over equal parameters. Hyperparameters are those of the optimizer's groups."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], kind: Callable[..., AlphaOptimizer] = AlphaAdam, **options: Any
    ) -> None:
        """``groups`` are param groups whose "params" are plain tensors, which are copied."""
        copies = [{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in groups]
        self.optimizer = kind(copies, **options)
        self.options = {k: v for k, v in options.items() if k not in self.optimizer.hyperparameters}
        self.model: list[rule.Coordinates] = []
        self.memory = rule.Memory()
        self._follow_groups()

    def add_param_group(self, group: dict[str, Any]) -> None:
        copy = {**group, "params": [nn.Parameter(p.detach().clone()) for p in group["params"]]}
        self.optimizer.add_param_group(copy)

    def _follow_groups(self) -> None:
        """Coordinates for new parameters, and the groups' hyperparameters, which schedulers change, for all."""
        flat = [
            (group, param, f"{i}.{j}")
            for i, group in enumerate(self.optimizer.param_groups)
            for j, param in enumerate(group["params"])
        ]
        dtype = getattr(torch, self.options.get("state_dtype") or "", None)
        for _, param, name in flat[len(self.model) :]:
            value = param.detach().clone(memory_format=torch.preserve_format)
            moments = [torch.zeros_like(value, dtype=dtype) for _ in self.optimizer.moments]
            counts = {"step": 0.0} if self.optimizer.counts_steps else {}
            self.model.append(rule.Coordinates(value, moments, counts, name))
        for (group, _, _), c in zip(flat, self.model, strict=True):
            c.hyperparameters.update({name: group[name] for name in self.optimizer.hyperparameters})

    def step(self, grads: Sequence[Tensor | None]) -> list[float]:
        self._follow_groups()
        step_with(self.optimizer, grads)
        copies = [None if g is None else g.clone() for g in grads]
        return rule.step_(self.model, copies, self.memory, self.optimizer.direction, **self.options)

    def differences(self) -> list[str]:
        """What of the optimizer does not have the bits of the rule."""
        wrong = []
        for i, (param, c) in enumerate(zip(parameters_of(self.optimizer), self.model, strict=True)):
            state = self.optimizer.state.get(param, {})
            if not same_bits(param, c.param):
                wrong.append(f"parameter {i}: {(param - c.param).abs().max()}")
            if float(state.get("step", 0.0)) != c.hyperparameters.get("step", 0.0):
                wrong.append(f"step of {i}: {state.get('step')} and {c.hyperparameters['step']}")
            for name, value in zip(self.optimizer.moments, c.moments, strict=True):
                if not same_bits(state.get(name, torch.zeros_like(value)), value):
                    wrong.append(f"{name} of {i}")
        m = self.memory
        if memory_of(self.optimizer) != [m.applied, m.alpha, m.agree, m.conflict]:
            wrong.append(f"memory {memory_of(self.optimizer)} and {m}")
        if self.optimizer.param_groups[0]["alphaadam_rounding"] != [1, m.n]:
            wrong.append(f"n {self.optimizer.param_groups[0]['alphaadam_rounding']} and {m.n}")
        return wrong
