"""Kinds of parameters and gradients: subclasses, layouts, dtypes, and parameters that were changed in place."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.two_tensor import TwoTensor

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, kernels
from alphaadam_dist.tensors import local

from .. import threads
from ..older import gradients_of_another_dtype
from .problems import Cast, gradients, memory_of, parameters_of, same_bits, step_with, tensors

KINDS = (AlphaAdam, AlphaLion, AlphaSGD)


class Opaque(Cast):
    """As ``Cast``, and nobody can know which of two tensors holds the values."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held", "held"], None


class Named(nn.Parameter):
    """A parameter with memory like any other, whose operations torch asks it about."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.mul_, Tensor.addcdiv_, Tensor.add_, torch._foreach_add_):
            raise NotImplementedError(f"{function} of a named parameter")
        return super().__torch_function__(function, types, args, kwargs or {})


def run(kind: Any, wrap: Any, *, fused: bool | None, **options: Any) -> tuple[list[Tensor], list[float], Any]:
    shapes = [(7, 5), (13,), (2, 3, 4)]
    held = tensors(0, shapes=shapes)
    optimizer = kind([(str(i), wrap(one)) for i, one in enumerate(held)], weight_decay=0.1, fused=fused, **options)
    for grads in gradients(6, shapes=shapes, absent=0.2):
        step_with(optimizer, grads)
    return held, memory_of(optimizer), optimizer


# ---- subclasses


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"clip_norm": 1.0, "threshold": 0.1}], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [Named, lambda held: nn.Parameter(Cast(held)), lambda held: nn.Parameter(Cast(Cast(held), torch.ones(())))],
    ids=["with memory", "around memory", "twice, and a scale"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_is_stepped_as_what_it_holds(kind: Any, wrap: Any, options: dict[str, Any], fused: bool) -> None:
    expected = run(kind, nn.Parameter, fused=fused, **options)
    params, memory, optimizer = run(kind, wrap, fused=fused, **options)
    assert memory == expected[1]
    for ours, theirs in zip(params, expected[0], strict=True):
        assert same_bits(ours, theirs)
    for param in parameters_of(optimizer):
        assert all(type(optimizer.state[param][name]) is Tensor for name in optimizer.moments)


def sharded(wrap: bool) -> list[Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = tensors(0, shapes=[(6, 5)])[0]
    part = whole.chunk(2)[dist.get_rank()].clone()
    param = nn.Parameter(DTensor.from_local(Cast(part) if wrap else part, mesh, [Shard(0)], run_check=False))
    optimizer = AlphaAdam([("weight", param)], lr=1e-2, fused=True, clip_norm=1.0)
    for (grad,) in gradients(5, shapes=[(6, 5)]):
        assert grad is not None
        param.grad = DTensor.from_local(grad.chunk(2)[dist.get_rank()], mesh, [Shard(0)], run_check=False)
        optimizer.step()
    return [memory_of(optimizer), part.tolist()]


def test_a_dtensor_over_a_subclass() -> None:
    """As FSDP2 shards weights that multiply in float8."""
    assert threads.run(2, sharded, True) == threads.run(2, sharded, False)


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoTensor(torch.ones(3), torch.ones(3)), r"TwoTensor of dtype torch\.float32.*Train a plain tensor"),
        (lambda: Opaque(torch.ones(3)), r"Opaque of dtype torch\.float32.*or leave the parameter out"),
        (lambda: Cast(torch.ones(3), torch.ones(3)), r"Cast of dtype torch\.float32"),
        (lambda: torch.ones(3).to_sparse(), r"layout torch\.sparse_coo: .*dense.*to_dense"),
        (lambda: torch.ones(3, 3).to_sparse_csc(), r"layout torch\.sparse_csc"),
        (lambda: torch.ones(3).to_mkldnn(), r"layout torch\._mkldnn"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), r"layout nested"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), r"layout"),
        (lambda: torch.ones(3, dtype=torch.cfloat), r"dtype torch\.complex64: AlphaAdam takes real .*Freeze it"),
        (lambda: torch.ones(3, dtype=torch.float8_e4m3fn), r"dtype torch\.float8_e4m3fn: .*bfloat16, float16"),
        (lambda: nn.UninitializedParameter(), r"no shape yet: call the lazy module once"),
        (lambda: torch._neg_view(torch.ones(3)), r"lazy negation.*resolve_neg"),
    ],
)  # fmt: skip
def test_what_cannot_be_stepped_is_refused_by_name(make: Any, message: str) -> None:
    def trainable() -> Any:
        made = make()
        return made if made.requires_grad else made.requires_grad_()

    with pytest.raises(ValueError, match=f"^parameter 'embedding'.*{message}"):
        AlphaAdam([("embedding", trainable())])
    optimizer = AlphaAdam([("a", nn.Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match=r"^parameter 'embedding'"):
        optimizer.add_param_group({"params": [("embedding", trainable())]})
    step_with(optimizer, [torch.ones(2)])
    assert memory_of(optimizer)[0] == 1.0


# ---- frozen parameters


FROZEN = {
    "4 bits, packed": lambda: torch.ones(3, dtype=torch.uint8),
    "int8": lambda: torch.ones(3, dtype=torch.int8),
    "float8": lambda: torch.ones(3, dtype=torch.float8_e4m3fn),
    "quantised": quantized,
    "of no one memory": lambda: TwoTensor(torch.ones(3), torch.ones(3)),
    "sparse": lambda: torch.ones(3).to_sparse(),
}


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"scope": "layer"}, {"clip_norm": 1.0}], ids=str)
@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_a_frozen_parameter_of_any_kind_changes_nothing(make: Any, options: dict[str, Any]) -> None:
    """As AdamW takes it: a base model in 4 bits under adapters, all of it given to the optimizer."""
    ended = []
    for frozen in ([], [("base", nn.Parameter(make(), requires_grad=False))]):
        adapter = nn.Parameter(torch.ones(4))
        optimizer = AlphaAdam([*frozen, ("adapter", adapter)], **options)
        for step in range(4):
            grad = torch.randn(4, generator=torch.Generator().manual_seed(step))
            step_with(optimizer, [None] * len(frozen) + [grad])
        assert list(optimizer.state) == [adapter]
        optimizer.load_state_dict(optimizer.state_dict())
        ended.append((optimizer.metrics(), optimizer.alpha, adapter.tolist()))
    assert ended[0] == ended[1]


def test_a_frozen_parameter_that_is_trained_later_is_refused_by_name() -> None:
    frozen = nn.Parameter(torch.ones(3, dtype=torch.float8_e4m3fn), requires_grad=False)
    optimizer = AlphaAdam([("a", nn.Parameter(torch.ones(2))), ("late", frozen)])
    step_with(optimizer, [torch.ones(2), None])
    frozen.requires_grad_()
    with pytest.raises(ValueError, match=r"^parameter 'late' has dtype torch\.float8_e4m3fn: .*Freeze it"):
        step_with(optimizer, [torch.ones(2), None])


# ---- an optimizer of which nothing is trained


def idle(count: int, *, frozen: bool = False, first: bool = False, **options: Any) -> list[str]:
    """What an optimizer warns of in so many steps without a gradient, after one with a gradient if ``first``."""
    param = nn.Parameter(torch.ones(2), requires_grad=not frozen)
    optimizer = AlphaAdam([("a", param)], **options)
    if first:
        step_with(optimizer, [torch.ones(2)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(count):
            step_with(optimizer, [None])
    return [str(one.message) for one in told]


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}], ids=str)
@pytest.mark.parametrize(("frozen", "why"), [(True, "all of them are frozen"), (False, "1 are trainable, but no back")])
def test_an_optimizer_that_never_gets_a_gradient_says_so_once(frozen: bool, why: str, options: dict[str, Any]) -> None:
    (told,) = idle(10, frozen=frozen, **options)
    assert "this AlphaAdam trains nothing: none of its 1 parameters has had a gradient in 3 steps" in told
    assert why in told
    assert "peft_config=" in told


def test_a_pause_is_not_told() -> None:
    assert idle(2) == []
    assert idle(10, first=True) == []


def idle_stage(everywhere: bool) -> list[str]:
    """On rank 0 nothing is trained; on rank 1 something is, unless ``everywhere``. One model over a group."""
    rank = dist.get_rank()
    optimizer = AlphaAdam([(f"stage{rank}", nn.Parameter(torch.ones(2)))], process_group=dist.group.WORLD,
                          sharding="sharded")  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            step_with(optimizer, [None if everywhere or rank == 0 else torch.ones(2)])
    return [str(one.message) for one in told if "trains nothing" in str(one.message)]


def test_a_frozen_stage_of_a_model_that_is_trained_is_not_told() -> None:
    assert threads.run(2, idle_stage, False) == [[], []]
    assert sum(len(told) for told in threads.run(2, idle_stage, True)) > 0


def test_a_subclass_that_comes_later_is_refused_too() -> None:
    """The gradient of a plain parameter may be one."""
    with pytest.raises(ValueError, match=r"Cast of dtype"):
        local(Cast(torch.ones(3), torch.ones(3)))
    held = torch.ones(3)
    assert local(Cast(held)) is held
    assert local(held) is held


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [AlphaLion, AlphaSGD])
def test_a_step_on_tensors_without_values_touches_no_memory(kind: Any, fused: bool) -> None:
    """As those who estimate the memory of a run take it."""
    with FakeTensorMode():
        optimizer = kind([nn.Parameter(torch.ones(3))], fused=fused)
        for _ in range(2):
            step_with(optimizer, [torch.ones(3)])
        held = optimizer.state[parameters_of(optimizer)[0]]
    assert {name: tuple(value.shape) for name, value in held.items()} == {optimizer.moments[0]: (3,)}


# ---- gradients of another dtype


@gradients_of_another_dtype
@pytest.mark.parametrize(
    ("fused", "small"), [(None, 0), (False, 0), (None, kernels.SMALL)], ids=["fast", "slow", "unasked"]
)
@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"threshold": 0.1}, {"clip_norm": 1.0},
                                     {"clip_norm": 1.0, "threshold": 0.1, "maximize": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("of_param", "of_grad"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float64),
                                                   (torch.bfloat16, torch.float32)], ids=str)  # fmt: skip
def test_a_gradient_of_another_dtype_is_converted_to_its_parameters(
    of_param: torch.dtype, of_grad: torch.dtype, options: dict[str, Any], fused: bool | None, small: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On all kernels and at every size, also where a gradient is too small for the parameter's dtype."""
    monkeypatch.setattr(kernels, "SMALL", small)
    ended = []
    for given in (of_param, of_grad):
        optimizer = AlphaSGD([nn.Parameter(p) for p in tensors(0, of_param)], fused=fused, **options)
        for grads in gradients(5, of_grad):
            for param, grad in zip(parameters_of(optimizer), grads, strict=True):
                assert grad is not None
                if grad.numel() > 3:
                    grad.view(-1)[2] = 1e-60 if of_grad == torch.float64 else 1e-39
                param.grad_dtype = given
                param.grad = grad.to(given)
            optimizer.step()
        ended.append((memory_of(optimizer), parameters_of(optimizer)))
    assert ended[0][0] == ended[1][0]
    assert all(same_bits(a, b) for a, b in zip(ended[0][1], ended[1][1], strict=True))


# ---- parameters that are changed in place


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "change",
    [lambda p: torch.ones(9), lambda p: torch.ones(2), lambda p: torch.ones(3, 2), lambda p: p.t(), lambda p: p[:1],
     lambda p: p.view(6)],
    ids=["larger", "smaller", "as large", "transposed", "a row", "flat"],
)  # fmt: skip
def test_moments_of_another_shape_are_refused_by_name(change: Any, fused: bool) -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3))]
    optimizer = AlphaAdam([("a", params[0]), ("b", params[1])], fused=fused)
    step_with(optimizer, [torch.ones(4), torch.ones(2, 3)])
    before = params[0].detach().clone()
    params[1].data = change(params[1].data)
    shape = tuple(params[1].shape)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"'b' has shape \({shape[0]},.*exp_avg \(2, 3\).*optimizer\.state"):
            step_with(optimizer, [torch.ones(4), torch.ones(shape)])
    assert same_bits(params[0], before)


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"scope": "layer"}], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_a_parameter_that_grew_goes_on_with_what_it_is_now(options: dict[str, Any], fused: bool) -> None:
    """A layer that grows, and its state with it: padded by zeros, as if it had had them from the start."""

    def grown(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.zeros(5)])

    ended = []
    for late in (False, True):
        param = nn.Parameter(torch.ones(4) if late else grown(torch.ones(4)))
        optimizer = AlphaAdam([("a", param)], fused=fused, weight_decay=0.0, **options)
        for step in range(6):
            if late and step == 3:
                param.data = grown(param.data)
                for name in optimizer.moments:
                    optimizer.state[param][name] = grown(optimizer.state[param][name])
            grad = torch.randn(9, generator=torch.Generator().manual_seed(step))
            step_with(optimizer, [grad[: len(param)] if step >= 3 else grown(grad[:4])[: len(param)]])
        ended.append((optimizer.metrics(), optimizer.alpha, param))
    assert ended[0][:2] == ended[1][:2]
    assert same_bits(ended[0][2], ended[1][2])


def test_a_parameter_may_be_resized_before_its_first_step() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = AlphaAdam([("a", param), ("b", nn.Parameter(torch.ones(1)))])
    step_with(optimizer, [None, torch.ones(1)])
    param.data = torch.ones(2)
    step_with(optimizer, [torch.tensor([1.0, 0.0]), torch.ones(1)])
    assert optimizer.agreement == {"agree": 2, "conflict": 0, "evidence_fraction": 2 / 3}
