"""What torch and its users do with an optimizer: closures, hooks, schedulers, GradScaler, odd parameters."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam

from .problems import SHAPES, Twin, gradients, memory_of, parameters_of, same_bits, step_with, tensors

MODES: dict[str, dict[str, Any]] = {"global": {}, "layer": {"scope": "layer"}, "delayed": {"sync": "delayed"}}
modes = pytest.mark.parametrize("mode", MODES)


def test_closure_runs_with_gradients_and_its_loss_comes_back() -> None:
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AlphaAdam([param], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 5.0
    # the first step of Adam is lr in the direction of the sign, to the rounding of eps and float32
    torch.testing.assert_close(param.data, torch.tensor([0.9, -1.9]), rtol=1e-6, atol=0)
    assert optimizer.step() is None


@modes
def test_maximize_ascends_as_negated_gradients_descend(mode: str) -> None:
    up = AlphaAdam([nn.Parameter(p) for p in tensors(0)], maximize=True, **MODES[mode])
    down = AlphaAdam([nn.Parameter(p) for p in tensors(0)], **MODES[mode])
    for grads in gradients(5):
        step_with(up, grads)
        step_with(down, [None if g is None else -g for g in grads])
    assert all(same_bits(a, b) for a, b in zip(parameters_of(up), parameters_of(down), strict=True))
    assert memory_of(up) == memory_of(down)
    kept = gradients(5)[-1]
    assert all(
        p.grad is not None and g is not None and same_bits(p.grad, g)
        for p, g in zip(parameters_of(up), kept, strict=True)
    )


@modes
@pytest.mark.parametrize("norms", [False, True])
def test_looking_in_inference_mode_changes_nothing(mode: str, norms: bool) -> None:
    """As trainers do during validation, also before the first step and after a load."""
    ends = []
    for look in (False, True):
        optimizer = AlphaAdam([nn.Parameter(p) for p in tensors(0)], telemetry=norms, **MODES[mode])
        for i, grads in enumerate(gradients(5)):
            if i == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if look:
                with torch.inference_mode():
                    assert optimizer.metrics()["steps"] == i
            step_with(optimizer, grads)
        ends.append((parameters_of(optimizer), memory_of(optimizer)))
    assert all(same_bits(p, q) for p, q in zip(ends[0][0], ends[1][0], strict=True))
    assert ends[0][1] == ends[1][1]


def test_step_hooks_run_around_the_step() -> None:
    optimizer = AlphaAdam([nn.Parameter(torch.ones(3))])
    param, seen = parameters_of(optimizer)[0], []

    def before(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(("before", memory_of(optimizer)[0]))
        assert param.grad is not None
        param.grad.mul_(-1)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("after", memory_of(optimizer)[0])))
    step_with(optimizer, [torch.ones(3)])
    assert seen == [("before", 0.0), ("after", 1.0)]
    assert (param > 1 - 1e-5).all()  # the hook turned the gradient around
    step_with(optimizer, [torch.ones(3)])
    assert [t for _, t in seen] == [0.0, 1.0, 1.0, 2.0]


@modes
@pytest.mark.parametrize("kind", ["one cycle", "lambda"])
def test_learning_rate_schedulers(mode: str, kind: str) -> None:
    """The rule is given what the scheduler wrote into the groups; both schedulers must really write."""
    twin = Twin([{"params": tensors(0)[:3]}, {"params": tensors(0)[3:], "lr": 1e-2}], lr=1e-3, **MODES[mode])
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if kind == "one cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(twin.optimizer, max_lr=[1e-2, 3e-2], total_steps=8)
    else:
        scheduler = torch.optim.lr_scheduler.LambdaLR(twin.optimizer, lambda epoch: 0.5**epoch)
    rates, betas = set(), set()
    for grads in gradients(8):
        twin.step(grads)
        rates.add(twin.optimizer.param_groups[1]["lr"])
        betas.add(twin.optimizer.param_groups[1]["betas"][0])
        scheduler.step()
    assert twin.differences() == []
    assert len(rates) > 4
    assert (len(betas) > 4) == (kind == "one cycle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lr", [torch.tensor(3e-3), torch.tensor([3e-3]), torch.tensor(3e-3, dtype=torch.float64)])
def test_a_tensor_lr_is_that_of_adamw_bitwise(dtype: torch.dtype, lr: Tensor) -> None:
    shapes = [shape for shape in SHAPES if shape]  # torch decays 0-dim parameters in the dtype of a 0-dim lr
    lr = lr.clone()
    ours = AlphaAdam([nn.Parameter(p) for p in tensors(0, dtype, shapes)], lr=lr, weight_decay=0.1, gamma=1.0)
    copies = [nn.Parameter(p) for p in tensors(0, dtype, shapes)]
    theirs = torch.optim.AdamW(copies, lr=lr.clone(), weight_decay=0.1, foreach=False)
    for i, grads in enumerate(gradients(8, dtype, shapes)):
        if i == 4:  # a scheduler fills the tensor
            lr.fill_(1e-3)
            theirs.param_groups[0]["lr"].fill_(1e-3)
        step_with(ours, grads)
        step_with(theirs, grads)
    assert ours.param_groups[0]["lr"] is lr
    assert all(same_bits(a, b) for a, b in zip(parameters_of(ours), copies, strict=True))


@modes
def test_grad_scaler_skips_a_step_with_inf_and_nothing_has_changed(mode: str) -> None:
    optimizer = AlphaAdam([nn.Parameter(p) for p in tensors(0)], lr=1e-2, **MODES[mode])
    beside = AlphaAdam([nn.Parameter(p) for p in tensors(0)], lr=1e-2, **MODES[mode])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    steps = gradients(6)
    for i, grads in enumerate(steps):
        scale = scaler.get_scale()
        before = [p.detach().clone() for p in parameters_of(optimizer)], memory_of(optimizer)
        taken = {p: float(s["step"]) for p, s in optimizer.state.items()}
        for param, grad in zip(parameters_of(optimizer), grads, strict=True):
            assert grad is not None
            param.grad = grad * scale
            if i == 3 and param.numel() == 13:
                param.grad[5] = math.inf
        scaler.scale(torch.tensor(1.0))
        scaler.step(optimizer)
        scaler.update()
        if i == 3:
            assert scaler.get_scale() == scale / 2
            assert all(same_bits(a, b) for a, b in zip(parameters_of(optimizer), before[0], strict=True))
            assert memory_of(optimizer) == before[1]
            assert taken == {p: float(s["step"]) for p, s in optimizer.state.items()}
        else:
            step_with(beside, grads)
    assert memory_of(optimizer) == memory_of(beside)
    assert memory_of(optimizer)[0] == 5.0
    # scales are powers of two, so unscaling is exact
    assert all(same_bits(a, b) for a, b in zip(parameters_of(optimizer), parameters_of(beside), strict=True))


# ---- odd parameters


def strided(kind: str) -> Tensor:
    values = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    if kind == "channels_last":
        return values.to(memory_format=torch.channels_last)
    return values.transpose(1, 3) if kind == "transposed" else values[:, :, ::2]


@modes
@pytest.mark.parametrize("kind", ["channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_parameters_that_are_not_contiguous(mode: str, kind: str, threshold: float) -> None:
    """Their gradients are, as often as not: position in memory and position in the tensor are two things."""
    start = strided(kind)
    assert not start.is_contiguous()
    odd = AlphaAdam([nn.Parameter(start.clone() if kind != "sliced" else start)], threshold=threshold, **MODES[mode])
    even = AlphaAdam([nn.Parameter(start.contiguous())], threshold=threshold, **MODES[mode])
    assert not parameters_of(odd)[0].is_contiguous()
    for i, (grad,) in enumerate(gradients(6, shapes=[tuple(start.shape)])):
        assert grad is not None
        alike = torch.empty_like(start).copy_(grad) if i % 2 else grad.clone()
        parameters_of(odd)[0].grad = alike
        odd.step()
        step_with(even, [grad])
        assert same_bits(parameters_of(odd)[0], parameters_of(even)[0])
    assert memory_of(odd) == memory_of(even)
    assert memory_of(odd)[3] > 0


@modes
def test_parameters_of_no_and_of_one_element(mode: str) -> None:
    shapes = [(0,), (), (1,), (1, 1), (3, 0, 2)]
    twin = Twin([{"params": tensors(0, shapes=shapes)}], **MODES[mode])
    for grads in gradients(20, shapes=shapes):
        twin.step(grads)
    assert twin.differences() == []
    assert sum(memory_of(twin.optimizer)[2:]) > 0
    if mode == "layer":
        alphas = twin.optimizer.alpha
        assert isinstance(alphas, dict)
        assert alphas["0.0"] == alphas["0.4"] == 1.0


@modes
def test_a_model_of_nothing_steps(mode: str) -> None:
    """The rank of a pipeline or of FSDP that holds no element."""
    optimizer = AlphaAdam([nn.Parameter(torch.zeros(0))], **MODES[mode])
    step_with(optimizer, [torch.zeros(0)])
    assert memory_of(optimizer) == [0.0, 1.0, 0.0, 0.0]
    assert optimizer.agreement["evidence_fraction"] == 0.0


def test_a_group_without_parameters_steps_as_in_adamw() -> None:
    for kind in (torch.optim.AdamW, AlphaAdam):
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [nn.Parameter(torch.ones(2))]}]
        optimizer = kind(groups)
        step_with(optimizer, [torch.ones(2)])
        assert parameters_of(optimizer)[0].tolist() < [1.0, 1.0]
        empty = kind([{"params": []}])
        empty.step()


def test_parameters_of_several_dtypes_in_one_group() -> None:
    params = [nn.Parameter(torch.ones(7, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float64)]
    optimizer = AlphaAdam(params)
    alone = [AlphaAdam([nn.Parameter(p.detach().clone())], gamma=1.0) for p in params]
    optimizer.defaults["gamma"] = 1.0
    for group in optimizer.param_groups:
        group["gamma"] = 1.0
    for seed in range(4):
        grad = torch.randn(7, generator=torch.Generator().manual_seed(seed))
        step_with(optimizer, [grad.to(p.dtype) for p in params])
        for p, one in zip(params, alone, strict=True):
            step_with(one, [grad.to(p.dtype)])
    assert all(same_bits(p, parameters_of(one)[0]) for p, one in zip(params, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_parameters_that_are_not_real_are_refused(dtype: torch.dtype) -> None:
    """Integers need no refusing: torch gives them no gradient, so they are frozen."""
    param = torch.zeros(3, dtype=dtype, requires_grad=True)
    with pytest.raises(ValueError, match=rf"{dtype!s}.*real floating point"):
        AlphaAdam([param])
    optimizer = AlphaAdam([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1
    step_with(optimizer, [torch.ones(2)])


@modes
def test_sparse_gradients_are_refused_before_anything_is_updated(mode: str) -> None:
    other, embedding = nn.Parameter(torch.ones(4)), nn.Embedding(5, 2, sparse=True)
    groups: list[dict[str, Any]] = [{"params": [other]}, {"params": [embedding.weight]}]
    optimizer = AlphaAdam(groups, **MODES[mode])
    embedding(torch.tensor([1, 2])).sum().backward()
    other.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"sparse gradients.*sparse=False"):
        optimizer.step()
    assert other.tolist() == [1.0] * 4


@modes
def test_a_step_that_raised_leaves_no_trace_in_the_statistics(mode: str) -> None:
    """A loop that catches and goes on is where it would have been without that step."""
    optimizer = AlphaAdam([nn.Parameter(p) for p in tensors(0)], **MODES[mode])
    beside = AlphaAdam([nn.Parameter(p) for p in tensors(0)], **MODES[mode])
    for i, grads in enumerate(gradients(6)):
        if i == 3:
            optimizer.param_groups[0]["gamma"] = 0.7
            with pytest.raises(ValueError, match=r"gamma=0\.7"):
                step_with(optimizer, grads)
            optimizer.param_groups[0]["gamma"] = 0.0
        step_with(optimizer, grads)
        step_with(beside, grads)
    assert memory_of(optimizer) == memory_of(beside)
    assert all(same_bits(a, b) for a, b in zip(parameters_of(optimizer), parameters_of(beside), strict=True))
