"""Many optimizers over one model: refused where alpha is the whole model's, and nobody else is."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.distributed.optim import _apply_optimizer_in_backward

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer

from ..older import before_2_7
from .problems import same_bits

WAY_OUT = r"one optimizer over all parameters .* after backward\(\), or give scope='layer' without clip_norm.*"
WAY_OUT += r"sync='delayed' and call its step_in_backward\(model\)"


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def loss_of(net: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    loss: Tensor = net(inputs).square().sum()
    return loss


def in_backward(net: nn.Module, kind: Any, **options: Any) -> None:
    _apply_optimizer_in_backward(kind, net.parameters(), {"lr": 1e-2, **options})
    for i in range(4):
        loss_of(net, i).backward()


def on_hooks(net: nn.Module, kind: Any, **options: Any) -> None:
    optimizers = {param: kind([param], lr=1e-2, **options) for param in net.parameters()}

    def update(param: Tensor) -> None:
        optimizers[param].step()
        param.grad = None

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(update)
    for i in range(4):
        loss_of(net, i).backward()


def after_backward(net: nn.Module, kind: Any, **options: Any) -> None:
    optimizers = [kind([param], lr=1e-2, **options) for param in net.parameters()]
    for i in range(4):
        loss_of(net, i).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def offloaded(net: nn.Module, kind: Any, **options: Any) -> None:
    """Each parameter has a copy elsewhere, with a gradient tensor that is written anew and never freed."""
    hosts: dict[Tensor, tuple[Tensor, Any]] = {}
    for param in net.parameters():
        host = param.detach().clone()
        host.grad = torch.zeros_like(host)
        hosts[param] = host, kind([{"params": host}], lr=1e-2, **options)

    def download(param: Tensor) -> None:
        host, _ = hosts[param]
        assert host.grad is not None
        assert param.grad is not None
        host.grad.copy_(param.grad)
        param.grad = None

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(download)
    for i in range(4):
        loss_of(net, i).backward()
        for param, (host, optimizer) in hosts.items():
            optimizer.step()
            param.data.copy_(host)


WAYS: list[Callable[..., None]] = [in_backward, on_hooks, after_backward, offloaded]
ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("kind", [AlphaAdam, AlphaLion, AlphaSGD])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "scope='global'"),
        ({"sync": "delayed"}, "scope='global'"),
        ({"scope": "layer", "clip_norm": 1.0}, "clip_norm=1.0"),  # the norm is the whole model's
        ({"scope": "layer", "alpha_warmup": 9}, "alpha_warmup=9"),  # and so is T, where a parameter has no gradient
    ],
    ids=str,
)
def test_one_optimizer_a_parameter_is_refused(
    way: Any, kind: type[AlphaOptimizer], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__} with {named} .*{WAY_OUT}"):
        way(model(), kind, **options)


@ways
@pytest.mark.parametrize("kind", [AlphaAdam, AlphaLion, AlphaSGD])
def test_by_layer_one_a_parameter_is_one_over_all(way: Any, kind: Any) -> None:
    parts, whole = model(), model()
    way(parts, kind, scope="layer")
    optimizer = kind(whole.parameters(), lr=1e-2, scope="layer")
    for i in range(4):
        loss_of(whole, i).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(same_bits(p, q) for p, q in zip(parts.parameters(), whole.parameters(), strict=True))
    assert optimizer.metrics()["agreement"] < 1


def test_a_whole_models_step_inside_a_backward_is_refused_and_changes_nothing() -> None:
    """Also as a callback at the end of the backward, where other callbacks may still write gradients."""
    net = model()
    optimizer = AlphaAdam(net.parameters())
    first = next(iter(net.parameters()))
    before = copy.deepcopy(net.state_dict())
    engine: Any = torch.autograd.Variable._execution_engine
    for hook in (lambda _: optimizer.step(), lambda _: engine.queue_callback(optimizer.step)):
        handle = first.register_post_accumulate_grad_hook(hook)
        with pytest.raises(ValueError, match="steps inside backward"):
            loss_of(net, 0).backward()
        handle.remove()
    assert all(same_bits(before[name], value) for name, value in net.state_dict().items())
    optimizer.step()
    assert optimizer.metrics()["steps"] == 1


@before_2_7("calls hooks under compiled autograd where a step is not refused: docs/versions.md says so")
def test_compiled_autograd_is_a_backward_too() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AlphaAdam([param])
    param.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with (
        pytest.raises(Exception, match="steps inside backward"),
        compiled_autograd._enable(torch.compile(backend="eager")),
    ):
        (param**2).sum().backward()


def test_closures_and_grad_scaler_step_after_the_backward() -> None:
    nets = [model() for _ in range(3)]
    plain, closed, scaled = (AlphaAdam(net.parameters(), lr=1e-2) for net in nets)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for i in range(4):
        loss_of(nets[0], i).backward()
        plain.step()
        plain.zero_grad()

        def closure(i: int = i) -> Tensor:
            closed.zero_grad()
            loss = loss_of(nets[1], i)
            loss.backward()
            return loss

        closed.step(closure)
        scaler.scale(loss_of(nets[2], i)).backward()
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
    for net in nets[1:]:
        assert all(same_bits(p, q) for p, q in zip(nets[0].parameters(), net.parameters(), strict=True))


# ---- optimizers of one parameter that are no parts of one model


def test_two_models_that_are_compared() -> None:
    """In turn, and both gradients first: equal shapes are compared, and no model has only one shape."""
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for gradients_first in (True, False):
        a, b = nn.Parameter(values.clone()), nn.Parameter(values.clone())
        first, second = AlphaAdam([a]), AlphaAdam([b])
        for i in range(5):
            grad = torch.randn(9, generator=torch.Generator().manual_seed(i))
            a.grad = grad.clone()
            if gradients_first:
                b.grad = grad.clone()
            first.step()
            b.grad = grad.clone() if not gradients_first else b.grad
            second.step()
        assert same_bits(a, b)
        assert first.alpha == second.alpha > 1


def test_models_of_one_parameter_in_turn() -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]
    optimizers = [AlphaAdam([param]) for param in params]
    for _ in range(4):
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.zero_grad()
            param.square().sum().backward()
            optimizer.step()
    assert [optimizer.metrics()["steps"] for optimizer in optimizers] == [4, 4, 4]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zeroes", ["both", "its own"])
def test_the_two_players_of_a_game(set_to_none: bool, zeroes: str) -> None:
    """One player's backward leaves a gradient with the other, who never steps with it."""
    generator, critic = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    players = AlphaAdam([generator]), AlphaAdam([critic])
    for i in range(4):
        noise = torch.randn(4, generator=torch.Generator().manual_seed(i))
        for sign, player in zip((-1, 1), players, strict=True):
            for optimizer in players if zeroes == "both" else (player,):
                optimizer.zero_grad(set_to_none)
            (sign * (generator @ noise) @ critic).sum().backward()
            player.step()
    assert [player.metrics()["steps"] for player in players] == [4, 4]


def test_optimizers_that_are_gone_are_forgotten() -> None:
    net = model()
    for _ in range(2):
        for param in net.parameters():
            optimizer = AlphaAdam([param])
            for i in range(2):
                net.zero_grad()
                loss_of(net, i).backward()
                optimizer.step()
    whole = AlphaAdam(net.parameters())
    loss_of(net, 0).backward()
    whole.step()
    assert whole.metrics()["steps"] == 1


def test_ranks_on_threads_have_models_of_their_own() -> None:
    failed: list[BaseException] = []
    meet = threading.Barrier(2, timeout=60)

    def rank(size: int) -> None:
        try:
            param = nn.Parameter(torch.ones(size))
            optimizer = AlphaAdam([param])
            for _ in range(4):
                param.grad = torch.ones(size)
                meet.wait()
                optimizer.step()
                meet.wait()
        except BaseException as error:
            failed.append(error)
            meet.abort()

    threads = [threading.Thread(target=rank, args=(size,)) for size in (3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
