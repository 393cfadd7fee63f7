"""The step in backward is step() after backward, bit for bit; what it cannot be is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.checkpoint import checkpoint

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer

from .problems import memory_of, parameters_of, same_bits

DELAYED: dict[str, Any] = {"lr": 1e-2, "sync": "delayed"}


class Net(nn.Module):
    """A tied weight, a frozen one, one that every other step leaves out, and one that is never used."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.never = nn.Parameter(torch.ones(3))
        self.calls = 0
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = torch.tanh(self.first(self.embedding(tokens)) * self.frozen)
        if self.calls % 2:
            x = x + self.second(x)
        return self.head(x)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.roll(1, 1).flatten())


def made(kind: Any = AlphaAdam, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Net, AlphaOptimizer]:
    model = Net(dtype)
    decayed = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    others = [(n, p) for n, p in model.named_parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 3e-3}]
    return model, kind(groups, **{**DELAYED, **options})


def differences(model: nn.Module, ours: AlphaOptimizer, other: nn.Module, theirs: AlphaOptimizer) -> list[str]:
    """What does not have the same bits, state and statistics included."""
    wrong = [n for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True) if not same_bits(a, b)]
    for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        mine, its = ours.state.get(a, {}), theirs.state.get(b, {})
        if set(mine) != set(its) or not all(same_bits(mine[name], its[name]) for name in mine):
            wrong.append(f"state {list(mine)}, {list(its)}")
    if memory_of(ours) != memory_of(theirs) or ours.alpha != theirs.alpha or ours.agreement != theirs.agreement:
        wrong.append(f"memory {memory_of(ours)} and {memory_of(theirs)}")
    rounding = [optimizer.state_dict()["param_groups"][0]["alphaadam_rounding"] for optimizer in (ours, theirs)]
    if rounding[0] != rounding[1]:
        wrong.append(f"rounding {rounding}")
    return wrong


def set_rate(optimizer: AlphaOptimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + step)


def train(model: nn.Module, optimizer: AlphaOptimizer, steps: range) -> None:
    """As a trainer does: a schedule, and the gradients of a step thrown away after it."""
    for step in steps:
        set_rate(optimizer, step)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


FAMILY: dict[str, tuple[Any, dict[str, Any]]] = {
    "AlphaAdam": (AlphaAdam, {"gamma": 0.3, "alpha_warmup": 3}),
    "AlphaAdam, fast": (AlphaAdam, {"fused": True, "threshold": 0.1}),
    "AlphaAdam, no masks": (AlphaAdam, {"gamma": 1.0, "lookahead": 0.5, "sync": "exact"}),
    "AlphaLion": (AlphaLion, {"maximize": True}),
    "AlphaLion, fast": (AlphaLion, {"fused": True}),
    "AlphaSGD": (AlphaSGD, {"momentum": 0.9, "nesterov": True}),
    "bf16 state": (AlphaAdam, {"state_dtype": "bfloat16"}),
    "bf16 state, fast": (AlphaAdam, {"state_dtype": "bfloat16", "fused": True}),
}


@pytest.mark.parametrize("name", FAMILY)
def test_it_is_the_step_after_backward(name: str) -> None:
    kind, options = FAMILY[name]
    dtype = torch.bfloat16 if "state_dtype" in options else torch.float32
    model, ours = made(kind, dtype, **options)
    other, theirs = made(kind, dtype, **options)
    ours.step_in_backward(model)
    for step in range(6):
        loss_of(model, step).backward()
        assert all(param.grad is None for param in model.parameters())
        loss_of(other, step).backward()
        theirs.step()
        theirs.zero_grad()
        assert differences(model, ours, other, theirs) == [], "before step(), where a checkpoint may be saved"
        ours.step()
        assert differences(model, ours, other, theirs) == [], f"step {step}"
    assert memory_of(ours)[0] == 6


def test_gradients_are_freed_one_by_one() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(6)])
    optimizer = AlphaAdam(model.named_parameters(), **DELAYED)
    optimizer.step_in_backward(model)
    alive = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(param.grad is not None for param in model.parameters()))
        )
    model(torch.ones(2, 4)).sum().backward()
    assert alive == [0] * 6, "hooks of the user's own see no gradient after the step"


def test_hooks_before_it_see_and_may_change_the_gradient() -> None:
    seen = []

    def halved(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(param.grad.clone())
        param.grad.mul_(0.5)

    (model, ours), (other, theirs) = made(), made()
    for one in (model, other):
        one.first.weight.register_post_accumulate_grad_hook(halved)
        one.second.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    ours.step_in_backward(model)
    train(model, ours, range(3))
    train(other, theirs, range(3))
    assert differences(model, ours, other, theirs) == []
    assert all(same_bits(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


def test_step_hooks_and_schedulers_run_once_a_step() -> None:
    (model, ours), (other, theirs) = made(), made()
    calls = []
    for optimizer in (ours, theirs):
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in (ours, theirs)]
    ours.step_in_backward(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            for one, optimizer, schedule in ((model, ours, schedules[0]), (other, theirs, schedules[1])):
                loss_of(one, step).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    assert differences(model, ours, other, theirs) == []
    assert len(calls) == 8


def test_a_closure() -> None:
    (model, ours), (other, theirs) = made(), made()
    ours.step_in_backward(model)
    for step in range(3):
        for one, optimizer in ((model, ours), (other, theirs)):

            def closure(one: nn.Module = one, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(one, step)
                loss.backward()
                return loss

            assert float(optimizer.step(closure).detach()) > 0
    assert differences(model, ours, other, theirs) == []


def test_parameters_come_and_go() -> None:
    """A group that is added, a parameter that is unfrozen, one that is frozen, one that is replaced."""
    (model, ours), (other, theirs) = made(), made()
    ours.step_in_backward(model)
    for one, optimizer in ((model, ours), (other, theirs)):
        train(one, optimizer, range(2))
        one.frozen.requires_grad_(True)
        one.first.bias.requires_grad_(False)
        torch.manual_seed(1)
        one.head = nn.Sequential(nn.Linear(8, 8), one.head)
        optimizer.add_param_group({"params": list(one.head[0].named_parameters())})
        train(one, optimizer, range(2, 5))
        one.never = nn.Parameter(torch.ones(3))
        place = next(i for i, p in enumerate(optimizer.param_groups[1]["params"]) if p.shape == (3,))
        optimizer.param_groups[1]["params"][place] = one.never
        train(one, optimizer, range(5, 7))
    assert differences(model, ours, other, theirs) == []
    loss_of(model, 7).backward()
    assert all(param.grad is None for param in model.parameters())


def test_gradients_that_no_backward_made() -> None:
    """torch's checkpoints make state by a step() with gradients of their own, and a step may have no gradient."""
    (model, ours), (other, theirs) = made(state_dtype="bfloat16"), made(state_dtype="bfloat16")
    ours.step_in_backward(model)
    for one, optimizer in ((model, ours), (other, theirs)):
        get_optimizer_state_dict(one, optimizer)
        train(one, optimizer, range(2))
        optimizer.step()
        train(one, optimizer, range(2, 4))
    assert differences(model, ours, other, theirs) == []


def test_a_gradient_from_before_is_added_to() -> None:
    (model, ours), (other, theirs) = made(), made()
    for one in (model, other):
        loss_of(one, 0).backward()
    ours.step_in_backward(model)
    train(model, ours, range(1, 4))
    train(other, theirs, range(1, 4))
    assert differences(model, ours, other, theirs) == []


@pytest.mark.parametrize("when", ["before step()", "after it"])
def test_a_checkpoint_goes_on(when: str) -> None:
    model, ours = made(state_dtype="bfloat16")
    ours.step_in_backward(model)
    train(model, ours, range(3))
    loss_of(model, 3).backward()
    if when == "after it":
        ours.step()
    saved = copy.deepcopy((model.state_dict(), ours.state_dict()))
    if when == "before step()":
        ours.step()
    train(model, ours, range(4, 6))
    for in_backward in (False, True):
        other, theirs = made(state_dtype="bfloat16")
        other.calls = 4
        if in_backward:  # which loading must leave as it is
            theirs.step_in_backward(other)
        other.load_state_dict(saved[0])
        theirs.load_state_dict(saved[1])
        train(other, theirs, range(4, 6))
        assert differences(model, ours, other, theirs) == []


def test_remove() -> None:
    (model, ours), (other, theirs) = made(), made()
    handle = ours.step_in_backward(model)
    train(model, ours, range(2))
    set_rate(ours, 2)
    loss_of(model, 2).backward()
    handle.remove()  # the step is taken, and its step() is still to come
    ours.step()
    train(model, ours, range(3, 4))
    set_rate(ours, 4)
    loss_of(model, 4).backward()
    assert model.first.weight.grad is not None
    ours.step()
    ours.zero_grad()
    train(other, theirs, range(5))
    assert differences(model, ours, other, theirs) == []
    handle.remove()
    ours.step_in_backward(model).remove()


def test_copies_do_not_step_in_backward() -> None:
    model, ours = made()
    ours.step_in_backward(model)
    train(model, ours, range(2))
    twin, optimizer = copy.deepcopy((model, ours))
    unpickled, its = pickle.loads(pickle.dumps((model, ours)))
    train(model, ours, range(2, 3))
    for other, theirs in ((twin, optimizer), (unpickled, its)):
        set_rate(theirs, 2)
        loss_of(other, 2).backward()
        assert other.first.weight.grad is not None
        theirs.step()
        assert differences(model, ours, other, theirs) == []


def test_an_optimizer_that_is_gone_steps_nothing() -> None:
    model, ours = made()
    ours.step_in_backward(model)
    del ours
    before = model.first.weight.clone()
    loss_of(model, 0).backward()
    assert model.first.weight.grad is not None
    assert torch.equal(model.first.weight, before)


# ---- what is refused


def accumulated(model: Net, optimizer: AlphaOptimizer) -> None:
    for step in range(2):
        loss_of(model, step).backward()


def scaled(model: Net, optimizer: AlphaOptimizer) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)


def unscaled(model: Net, optimizer: AlphaOptimizer) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def written_by_hand(model: Net, optimizer: AlphaOptimizer) -> None:
    loss_of(model, 0).backward()
    model.first.weight.grad = torch.ones(8, 8)
    optimizer.step()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ArithmeticError("in the middle")


def half_a_backward(model: Net) -> None:
    handle = model.first.register_forward_pre_hook(lambda _, args: Failing.apply(*args))
    with pytest.raises(ArithmeticError):
        loss_of(model, 0).backward()
    handle.remove()


def step_after_a_failure(model: Net, optimizer: AlphaOptimizer) -> None:
    half_a_backward(model)
    optimizer.step()


def backward_after_a_failure(model: Net, optimizer: AlphaOptimizer) -> None:
    half_a_backward(model)
    loss_of(model, 1).backward()


def step_inside(model: Net, optimizer: AlphaOptimizer) -> None:
    model.embedding.weight.register_hook(lambda _: optimizer.step())
    loss_of(model, 0).backward()


def removed_inside(model: Net, optimizer: AlphaOptimizer) -> None:
    model.embedding.weight.register_hook(lambda _: optimizer._run.in_backward.remove())  # type: ignore[union-attr]
    loss_of(model, 0).backward()


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (accumulated, "a second backward.*no gradient accumulation"),
        (scaled, "GradScaler.*Train in bf16"),
        (unscaled, "GradScaler.*Train in bf16"),
        (written_by_hand, "'first.weight' has a gradient after it was stepped"),
        (step_after_a_failure, "failed in the middle.*load a checkpoint"),
        (backward_after_a_failure, "failed in the middle.*load a checkpoint"),
        (step_inside, "step\\(\\) inside the backward"),
        (removed_inside, "remove\\(\\) inside the backward"),
    ],
)
def test_misuse_is_an_error(does: Callable[[Net, AlphaOptimizer], None], says: str) -> None:
    model, optimizer = made()
    optimizer.step_in_backward(model)
    with pytest.raises(RuntimeError, match=f"(?s){says}"):
        does(model, optimizer)


def test_after_a_failure_a_checkpoint_goes_on() -> None:
    (model, ours), (other, theirs) = made(), made()
    handle = ours.step_in_backward(model)
    train(model, ours, range(2))
    train(other, theirs, range(4))
    saved = copy.deepcopy((model.state_dict(), ours.state_dict()))
    half_a_backward(model)
    handle.remove()
    model.load_state_dict(saved[0])
    ours.load_state_dict(saved[1])
    ours.zero_grad()
    ours.step_in_backward(model)
    model.calls = 2
    train(model, ours, range(2, 4))
    assert differences(model, ours, other, theirs) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sync": "exact"}, "sync='exact' with step_in_backward.*Give sync='delayed'"),
        ({"sync": "exact", "clip_norm": 1.0}, "clip_norm=1.0 with step_in_backward.*no clip_norm"),
        ({"sync": "exact", "scope": "layer"}, "sync='exact' with step_in_backward"),
    ],
)
def test_options_that_need_the_whole_gradient(options: dict[str, Any], says: str) -> None:
    model, optimizer = made(**options)
    with pytest.raises(ValueError, match=f"(?s){says}"):
        optimizer.step_in_backward(model)


def test_an_option_that_is_changed_later() -> None:
    model, optimizer = made()
    optimizer.step_in_backward(model)
    train(model, optimizer, range(1))
    optimizer.defaults["sync"] = "exact"
    for group in optimizer.param_groups:
        group["sync"] = "exact"
    with pytest.raises(ValueError, match="sync='exact' with step_in_backward"):
        loss_of(model, 1).backward()


def test_the_model_is_the_optimizers() -> None:
    model, optimizer = made()
    with pytest.raises(TypeError, match="give the module"):
        optimizer.step_in_backward(list(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parameter 'embedding.weight' of the optimizer is none of the model's"):
        optimizer.step_in_backward(Net())
    alone = AlphaAdam(model.first.named_parameters(), **DELAYED)
    with pytest.warns(UserWarning, match="4 trainable parameters of the model are not this AlphaAdam's"):
        alone.step_in_backward(model)
    with pytest.raises(RuntimeError, match="steps in backward already"):
        alone.step_in_backward(model)


def test_lightnings_clipping_would_be_lost() -> None:
    model, optimizer = made()
    model._trainer = SimpleNamespace(gradient_clip_val=1.0)  # type: ignore[assignment]  # as a LightningModule has it
    with pytest.raises(ValueError, match=r"gradient_clip_val=1.0\) with step_in_backward"):
        optimizer.step_in_backward(nn.ModuleList([model]))
    model._trainer.gradient_clip_val = None  # type: ignore[union-attr]
    optimizer.step_in_backward(model)


@pytest.mark.slow
def test_compiled_models() -> None:
    (model, ours), (other, theirs) = made(), made()
    compiled, reference = (torch.compile(one, backend="aot_eager") for one in (model, other))
    ours.step_in_backward(compiled)
    train(compiled, ours, range(4))
    train(reference, theirs, range(4))
    assert differences(model, ours, other, theirs) == []


@pytest.mark.slow
def test_a_compiled_backward_is_refused() -> None:
    model, optimizer = made()
    optimizer.step_in_backward(model)
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match="compiled_autograd=False"),
    ):
        loss_of(model, 0).backward()


def test_reentrant_checkpointing() -> None:
    """Served where the head is outside of it and a parameter is in one part; else an error."""

    def run(model: nn.Module, optimizer: AlphaOptimizer, head: bool) -> None:
        for step in range(3):
            x = torch.full((2, 4), 1.0 + step, requires_grad=True)
            for layer in model[:-1]:
                x = checkpoint(layer, x, use_reentrant=True)
            x = model[-1](x) if head else checkpoint(model[-1], x, use_reentrant=True)
            x.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def some(layers: int = 3) -> tuple[nn.Sequential, AlphaOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
        return model, AlphaAdam(model.named_parameters(), **DELAYED)

    (model, ours), (other, theirs) = some(), some()
    ours.step_in_backward(model)
    run(model, ours, head=True)
    run(other, theirs, head=True)
    assert differences(model, ours, other, theirs) == []
    model, ours = some()
    ours.step_in_backward(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(model, ours, head=False)
    model, ours = some(2)
    ours.step_in_backward(model)
    with pytest.raises(RuntimeError, match=r"'0.weight' got a second gradient in one backward|'0.bias' got a second"):
        run(nn.Sequential(model[0], model[0], model[1]), ours, head=True)
