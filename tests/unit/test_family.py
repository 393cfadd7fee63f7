"""AlphaLion, AlphaSGD and the optimizer of docs/algorithm.md: the rule, torch's SGD, checkpoints, options."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer

from ..family import AlphaSignum
from .problems import SHAPES, Twin, gradients, memory_of, parameters_of, same_bits, step_with, tensors

KINDS: dict[str, tuple[type[AlphaOptimizer], dict[str, Any]]] = {
    "lion": (AlphaLion, {"betas": (0.8, 0.95)}),
    "sgd": (AlphaSGD, {"momentum": 0.8}),
    "nesterov": (AlphaSGD, {"nesterov": True}),
    "signum": (AlphaSignum, {"beta": 0.8}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
MODES: dict[str, dict[str, Any]] = {
    "exact": {"threshold": 0.1},
    "clipped": {"clip_norm": 1.0},
    "layer": {"scope": "layer", "gamma": 0.2},
    "delayed": {"sync": "delayed", "alpha_warmup": 5, "maximize": True},
}
STEPS = gradients(10, absent=0.2)


def new(kind: type[AlphaOptimizer] | type[torch.optim.SGD], **options: Any) -> Any:
    copies = [nn.Parameter(p) for p in tensors(0)]
    return kind([{"params": copies[:2], "lr": 3e-3}, {"params": copies[2:]}], **{"lr": 1e-2, **options})


def run(optimizer: Any, steps: list[Any]) -> None:
    for grads in steps:
        step_with(optimizer, grads)


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    pairs = list(zip(parameters_of(a), parameters_of(b), strict=True))
    return all(
        same_bits(p, q) and all(same_bits(a.state[p][key], b.state[q][key]) for key in a.state[p] | b.state[q])
        for p, q in pairs
    )


# ---- the step


@kinds
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_bitwise(kind: str, mode: str, dtype: torch.dtype) -> None:
    optimizer, own = KINDS[kind]
    weights = tensors(0, dtype)
    groups = [{"params": weights[:2], "lr": 3e-2, "weight_decay": 0.3}, {"params": weights[2:]}]
    twin = Twin(groups, optimizer, lr=1e-2, weight_decay=0.1, **own, **MODES[mode])
    for grads in gradients(10, dtype, absent=0.2):
        twin.step(grads)
    assert twin.differences() == []
    assert twin.memory.conflict > 0
    assert twin.memory.alpha > 1


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gamma_one_without_decay_is_sgd_bitwise(nesterov: bool, dtype: torch.dtype) -> None:
    """In 16 bits torch's own result depends on whether an element fills a vector, so there they all do."""
    if dtype.itemsize == 2 and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch has no 16-bit vectors for this processor")
    shapes = SHAPES if dtype.itemsize > 2 else [(64,), (128, 3), (2, 64)]
    own: dict[str, Any] = {"lr": torch.tensor(1e-2), "momentum": 0.9, "nesterov": nesterov}
    ours = AlphaSGD([nn.Parameter(p) for p in tensors(0, dtype, shapes)], gamma=1.0, **own)
    theirs = torch.optim.SGD([nn.Parameter(p) for p in tensors(0, dtype, shapes)], foreach=False, fused=False, **own)
    steps = gradients(10, dtype, shapes, absent=0.2)
    run(ours, steps)
    run(theirs, steps)
    assert same(ours, theirs)


def sixteenths(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers whose squares add up to the same sum in any order."""
    return (tensor * 16).round().div(16).to(dtype)


@kinds
@pytest.mark.parametrize("mode", ["exact", "clipped", "delayed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_parameter_may_be_cut_anywhere(kind: str, mode: str, dtype: torch.dtype) -> None:
    """One parameter, and the same as seven: every bit and every count is the same."""
    optimizer, own = KINDS[kind]
    ended = []
    for pieces in ([300], [1, 31, 5, 100, 33, 67, 63]):
        params = [nn.Parameter(part) for part in sixteenths(tensors(0, shapes=[(300,)])[0], dtype).split(pieces)]
        cut = optimizer(params, lr=0.03, weight_decay=0.1, **own, **MODES[mode])
        for (grad,) in gradients(8, shapes=[(300,)]):
            assert grad is not None
            step_with(cut, sixteenths(grad, dtype).split(pieces))
        states = [torch.cat([cut.state[p][name] for p in params]) for name in cut.moments]
        ended.append(([torch.cat(list(params)).detach(), *states], memory_of(cut)))
    assert ended[0][1] == ended[1][1]
    assert all(same_bits(a, b) for a, b in zip(ended[0][0], ended[1][0], strict=True))


def test_lion_moves_by_nothing_the_learning_rate_or_alpha_times_it() -> None:
    """The momentum is that of the published Lion; where it and the gradient agree a coordinate moves by alpha lr."""
    optimizer = AlphaLion([nn.Parameter(torch.zeros(4))], lr=0.5)
    step_with(optimizer, [torch.tensor([1.0, 1.0, 1.0, 1.0])])
    assert parameters_of(optimizer)[0].tolist() == [-0.5] * 4  # no history: nothing conflicts
    step_with(optimizer, [torch.tensor([2.0, 3.0, -1.0, 0.0])])
    assert optimizer.alpha == 1.5
    assert parameters_of(optimizer)[0].tolist() == [-1.25, -1.25, -0.5, -1.0]
    expected = [0.99 * 0.01 + 0.01 * g for g in (2.0, 3.0, -1.0, 0.0)]
    assert optimizer.state[parameters_of(optimizer)[0]]["exp_avg"].tolist() == pytest.approx(expected, rel=1e-5)


@kinds
def test_the_state_is_the_moments_and_nothing_else(kind: str) -> None:
    optimizer = new(KINDS[kind][0], **KINDS[kind][1])
    run(optimizer, STEPS[:1])
    held = {tuple(state) for state in optimizer.state.values()}
    assert held == {("momentum_buffer",) if isinstance(optimizer, AlphaSGD) else ("exp_avg",)}


# ---- checkpoints


@pytest.mark.parametrize("kind", ["lion", "nesterov"])
@pytest.mark.parametrize("mode", ["exact", "delayed"])
@pytest.mark.parametrize("how", ["load", "pickle"])
def test_what_was_saved_goes_on_bitwise(kind: str, mode: str, how: str) -> None:
    optimizer, own = KINDS[kind]
    whole, first, second = (new(optimizer, **own, **MODES[mode]) for _ in range(3))
    run(whole, STEPS)
    run(first, STEPS[:5])
    if how == "pickle":
        second = pickle.loads(pickle.dumps(first))
    else:
        for p, q in zip(parameters_of(second), parameters_of(first), strict=True):
            p.data.copy_(q.data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, STEPS[5:])
    assert same(whole, second)
    assert memory_of(whole) == memory_of(second)


@pytest.mark.parametrize("there", [True, False], ids=["from SGD", "to SGD"])
def test_checkpoints_of_sgd(there: bool) -> None:
    own: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
    ours, theirs, alone = new(AlphaSGD, gamma=1.0, **own), new(torch.optim.SGD, **own), new(torch.optim.SGD, **own)
    first, second = (theirs, ours) if there else (ours, theirs)
    run(alone, STEPS)
    run(first, STEPS[:5])
    for p, q in zip(parameters_of(second), parameters_of(first), strict=True):
        p.data.copy_(q.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, STEPS[5:])
    assert same(second, alone)
    if there:
        assert ours.metrics()["steps"] == 5  # SGD does not count them


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (lambda: new(torch.optim.SGD, momentum=0.9, dampening=0.1), AlphaSGD, r"dampening=0\.1, which AlphaSGD"),
        (lambda: new(torch.optim.SGD), AlphaSGD, r"momentum=0.*more than 0"),
        (
            lambda: new(torch.optim.AdamW),
            AlphaLion,
            r"exp_avg, exp_avg_sq of a parameter, where AlphaLion keeps exp_avg",
        ),
        (lambda: new(torch.optim.AdamW), AlphaSGD, r"where AlphaSGD keeps momentum_buffer: it was written by another"),
        (lambda: new(AlphaLion), AlphaAdam, r"has exp_avg of a parameter, where AlphaAdam keeps exp_avg, exp_avg_sq"),
    ],
    ids=["dampening", "no momentum", "AdamW to Lion", "AdamW to SGD", "Lion to Adam"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(saved: Any, loaded: Any, message: str) -> None:
    first, second = saved(), new(loaded)
    run(first, STEPS[:2])
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(first.state_dict())
    assert not second.state


def test_the_decay_of_sgd_warns() -> None:
    theirs = new(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 to the gradient; AlphaSGD's decay is decoupled"):
        new(AlphaSGD).load_state_dict(theirs.state_dict())


# ---- options

BAD: list[tuple[type[AlphaOptimizer], dict[str, Any], str, str]] = [
    (AlphaLion, {"lr": -1.0}, "lr=-1.0", "0 or more"),
    (AlphaLion, {"betas": (0.9,)}, "betas=(0.9,)", "two numbers"),
    (AlphaLion, {"betas": (0.9, 1.0)}, "betas[1]=1.0", "less than 1"),
    (AlphaSGD, {"weight_decay": -1}, "weight_decay=-1", "0 or more"),
    *[(AlphaSGD, {"momentum": v}, f"momentum={v!r}", "more than 0") for v in (0, -0.1, 1.0, "auto", None, True)],
    *[(AlphaSGD, {"nesterov": v}, f"nesterov={v!r}", "True or False") for v in (1, "true", None)],
    (AlphaSignum, {"beta": 1.0}, "beta=1.0", "less than 1"),
    (AlphaSignum, {"sync": "delayed", "scope": "layer"}, "sync='delayed' with scope='layer'", "scope='global'"),
]


@pytest.mark.parametrize(("kind", "options", "named", "fix"), BAD, ids=[str(options) for _, options, _, _ in BAD])
def test_bad_options_are_refused(kind: Any, options: dict[str, Any], named: str, fix: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        kind([nn.Parameter(torch.ones(2))], **options)
    assert fix in str(refusal.value)


@pytest.mark.parametrize("kind", [AlphaLion, AlphaSGD, AlphaSignum])
def test_look_ahead_is_alphaadams_alone(kind: Any) -> None:
    """Refused where it is given, in a group, in defaults changed later and in a checkpoint; 0 is let through."""
    params = [nn.Parameter(torch.ones(2))]
    refusal = rf"lookahead=0.5: {kind.__name__} has none, AlphaAdam alone has \(AlphaSGD has nesterov\)"
    with pytest.raises(ValueError, match=refusal):
        kind(params, lookahead=0.5)
    with pytest.raises(ValueError, match=refusal):
        kind([{"params": params, "lookahead": 0.5}])
    optimizer = kind(params, lookahead=0)
    step_with(optimizer, [torch.ones(2)])
    saved = optimizer.state_dict()
    optimizer.defaults["lookahead"] = saved["param_groups"][0]["lookahead"] = 0.5
    with pytest.raises(ValueError, match=refusal):
        optimizer.step()
    with pytest.raises(ValueError, match=refusal):
        kind(params).load_state_dict(saved)


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [(AlphaSGD, "betas", None), (AlphaSGD, "dampening", None), (AlphaSGD, "momentun", "momentum"),
     (AlphaLion, "eps", None), (AlphaLion, "gama", "gamma"), (AlphaSignum, "beta2", "beta")],
)  # fmt: skip
def test_unknown_options_name_the_class(kind: Any, name: str, near: str | None) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} has no option '{name}'") as refusal:
        kind([nn.Parameter(torch.ones(2))], **{name: 0.5})
    assert (f"did you mean {near!r}?" in str(refusal.value)) == (near is not None)


@pytest.mark.parametrize("kind", [AlphaAdam, AlphaLion, AlphaSGD, AlphaSignum])
def test_help_shows_every_option(kind: type) -> None:
    """Classes take the family's options as keywords; their signature names them one by one, with defaults."""
    shown = inspect.signature(kind).parameters
    assert list(shown)[:2] == ["params", "lr"]
    assert {"gamma", "threshold", "scope", "sync", "clip_norm", "sharding", "process_group"} < set(shown)
    assert shown["alpha_max"].default == 4.0
    assert "family" not in shown
    assert "unknown" not in shown
