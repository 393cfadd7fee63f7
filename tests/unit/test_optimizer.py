"""AlphaAdam in one process, bit for bit against rule.step_, and everything torch does with an optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alphaadam_dist import AlphaAdam

from .problems import SHAPES, Twin, gradients, memory_of, parameters_of, same_bits, step_with, tensors

MODES: dict[str, dict[str, Any]] = {
    "global": {},
    "layer": {"scope": "layer"},
    "delayed": {"sync": "delayed"},
    "global clipped": {"clip_norm": 2.0},
    "layer clipped": {"scope": "layer", "clip_norm": 2.0},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
modes = pytest.mark.parametrize("mode", MODES)


def two_groups(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    params = tensors(0, dtype)
    return [
        {"params": params[:2], "lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95)},
        {"params": params[2:], "lr": 1e-2, "weight_decay": 0.0, "eps": 1e-6},
    ]


# ---- against the rule


@pytest.mark.parametrize("dtype", DTYPES)
@modes
def test_the_rule_bitwise(mode: str, dtype: torch.dtype) -> None:
    """The options that change the numbers, in combination, with gradients None here and there."""
    steps = gradients(10, dtype, absent=0.2)
    # gamma, alpha_max, alpha_warmup, lookahead
    strengths = ((0.0, 4.0, 0, 0.25), (0.3, 4.0, 4, 0.0), (0.0, 1.5, 0, 0.0))
    for threshold, (gamma, alpha_max, warmup, lookahead), maximize in itertools.product(
        (0.0, 1 / 9), strengths, (False, True)
    ):
        options = {
            "threshold": threshold, "gamma": gamma, "alpha_max": alpha_max, "alpha_warmup": warmup,
            "lookahead": lookahead, "maximize": maximize, **MODES[mode],
        }  # fmt: skip
        twin = Twin(two_groups(dtype), **options)
        for grads in steps:
            alphas = twin.step(grads)
        wrong = twin.differences()
        if mode.endswith("clipped") and dtype == torch.float64:
            # the norm is summed in another order, and float64 keeps that last bit: 1e-12 is thousands of them
            wrong = [w for w in wrong if w.startswith(("step", "memory"))]
            for param, c in zip(parameters_of(twin.optimizer), twin.model, strict=True):
                torch.testing.assert_close(param.data, c.param, rtol=1e-12, atol=1e-12)
        assert wrong == [], options
        if mode.startswith("layer"):
            held = twin.optimizer.alpha
            assert isinstance(held, dict)
            names = ["0.0", "0.1", "1.0", "1.1", "1.2", "1.3"]
            present = [name for name, grad in zip(names, steps[-1], strict=True) if grad is not None]
            assert [held[name] for name in present] == alphas
        else:
            assert twin.optimizer.alpha == twin.memory.alpha
        assert twin.optimizer.agreement["conflict"] == twin.memory.conflict > 0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("mode", ["global", "layer", "delayed"])
@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_gamma_one_is_adamw_bitwise(mode: str, dtype: torch.dtype, beta2: float) -> None:
    hyper: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, beta2), "eps": 1e-4}
    ours = AlphaAdam([nn.Parameter(p) for p in tensors(0, dtype)], gamma=1.0, **hyper, **MODES[mode])
    theirs = torch.optim.AdamW([nn.Parameter(p) for p in tensors(0, dtype)], foreach=False, **hyper)
    for grads in gradients(10, dtype, absent=0.2):
        step_with(ours, grads)
        step_with(theirs, grads)
    for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@modes
def test_looking_ahead_alone_is_the_rule_bitwise(mode: str, dtype: torch.dtype) -> None:
    """With gamma 1 nothing is counted, T counts the steps, and what needs no counts still works."""
    options = {**MODES[mode], "alpha_warmup": 3, "threshold": 0.1, "clip_norm": None}
    twin = Twin(two_groups(dtype), lookahead=0.25, gamma=1.0, **options)
    for grads in [*gradients(5, dtype, absent=0.2), [torch.zeros(shape, dtype=dtype) for shape in SHAPES]]:
        twin.step(grads)
    assert twin.differences() == []
    assert memory_of(twin.optimizer) == [6.0, 1.0, 0.0, 0.0]
    assert twin.optimizer.metrics() == {"alpha": 1.0, "agreement": None, "evidence": None, "steps": 6.0}
    assert twin.optimizer.agreement == {"agree": 0, "conflict": 0, "evidence_fraction": 0.0}


@pytest.mark.parametrize("sync", ["exact", "delayed"])
def test_masks_may_end_and_begin_again(sync: str) -> None:
    """gamma is changed in mid-run: T goes on, and what was counted is no more."""
    twin = Twin(two_groups(), sync=sync, gamma=0.0)
    seen, steps = [], gradients(9)
    for i, gamma in enumerate((0.0, 1.0, 0.3)):
        twin.optimizer.defaults["gamma"] = twin.options["gamma"] = gamma
        for group in twin.optimizer.param_groups:
            group["gamma"] = gamma
        for grads in steps[3 * i : 3 * i + 3]:
            twin.step(grads)
        assert twin.differences() == []
        seen.append(memory_of(twin.optimizer))
    assert [applied for applied, *_ in seen] == [3, 6, 9]
    assert seen[1][1:] == [1, 0, 0]
    assert seen[2][1] > 1


def test_clipping_is_that_of_torch_for_one_tensor() -> None:
    """clip_norm beside clip_grad_norm_ before AdamW; the norm in float64 against float32."""
    ours = AlphaAdam([nn.Parameter(torch.ones(100))], gamma=1.0, clip_norm=0.5)
    theirs = torch.optim.AdamW([nn.Parameter(torch.ones(100))], foreach=False)
    for seed in range(5):
        grad = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        step_with(ours, [grad])
        parameters_of(theirs)[0].grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(parameters_of(theirs), 0.5)
        theirs.step()
        # float32 rounding of the norm, of the coefficient and of the product, of gradients up to 0.1
        a, b = ours.state[parameters_of(ours)[0]]["exp_avg"], theirs.state[parameters_of(theirs)[0]]["exp_avg"]
        torch.testing.assert_close(a, b, rtol=5e-7, atol=1e-8)
        kept = parameters_of(ours)[0].grad
        assert kept is not None
        assert same_bits(kept, grad)  # the gradient itself stays as it was


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_clipped_gradient_is_counted_as_it_is_used(dtype: torch.dtype, scope: str) -> None:
    """A threshold needs the clipped gradient, and in 16 bits many lie at the threshold: one rounding counts."""
    shapes = [(3000,), (200,)]
    twin = Twin([{"params": tensors(0, dtype, shapes)}], clip_norm=1.0, threshold=0.1, scope=scope, eps=1e-4)
    for grads in gradients(6, dtype, shapes):
        twin.step(grads)
        memory = twin.memory
        assert memory_of(twin.optimizer) == [memory.applied, memory.alpha, memory.agree, memory.conflict]
    assert twin.memory.conflict > 300


@modes
def test_groups_that_come_later(mode: str) -> None:
    twin = Twin(two_groups()[:1], **MODES[mode])
    for grads in gradients(4, shapes=SHAPES[:2]):
        twin.step(grads)
    twin.add_param_group(two_groups()[1])
    for grads in gradients(4, seed=3):
        twin.step(grads)
    assert twin.differences() == []
    assert [c.hyperparameters["step"] for c in twin.model] == [8.0] * 2 + [4.0] * 4


@modes
def test_lr_zero_advances_moments_and_counts(mode: str) -> None:
    twin = Twin([{"params": tensors(0)}], lr=0.0, **MODES[mode])
    for grads in gradients(5):
        twin.step(grads)
    assert twin.differences() == []
    assert all(same_bits(param, start) for param, start in zip(parameters_of(twin.optimizer), tensors(0), strict=True))
    assert memory_of(twin.optimizer)[0] == 5.0
    assert memory_of(twin.optimizer)[3] > 0


def test_gradient_none_leaves_a_parameter_alone() -> None:
    optimizer = AlphaAdam([nn.Parameter(p) for p in tensors(0)], lr=0.1, weight_decay=0.5)
    step_with(optimizer, gradients(1)[0])
    first = parameters_of(optimizer)[0]
    before, held = first.detach().clone(), {k: v.clone() for k, v in optimizer.state[first].items()}
    step_with(optimizer, [None, *gradients(1, seed=4)[0][1:]])
    assert same_bits(first, before)
    assert {k: v.tolist() for k, v in held.items()} == {k: v.tolist() for k, v in optimizer.state[first].items()}
    assert float(optimizer.state[parameters_of(optimizer)[1]]["step"]) == 2.0
    step_with(optimizer, [None] * len(SHAPES))  # and a step where every gradient is None is no step
    assert memory_of(optimizer)[0] == 2.0


# ---- what it tells


def test_agreement_and_alpha_against_hand_counts() -> None:
    a, b = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))
    optimizer = AlphaAdam([("a", a), ("b", b)])
    assert optimizer.alpha == 1.0
    assert optimizer.agreement == {"agree": 0, "conflict": 0, "evidence_fraction": 0.0}
    step_with(optimizer, [torch.tensor([1.0, 1, 1, 0, 1]), torch.tensor([-1.0, 0, 0])])
    assert optimizer.alpha == 1.0
    assert optimizer.agreement == {"agree": 5, "conflict": 0, "evidence_fraction": 5 / 8}
    step_with(optimizer, [torch.tensor([1.0, -1, -1, 3, 0]), torch.tensor([1.0, 2, 0])])
    # agree: a0, a3 (no history), b1 (no history); conflict: a1, a2, b0
    assert optimizer.agreement == {"agree": 3, "conflict": 3, "evidence_fraction": 6 / 8}
    assert optimizer.alpha == 2.0
    step_with(optimizer, [None, torch.tensor([-1.0, -1, 0])])
    # b0's momentum is 0.9 * -0.1 + 0.1 * 1 = 0.01: the change of its gradient's sign made it positive
    assert optimizer.agreement == {"agree": 0, "conflict": 2, "evidence_fraction": 2 / 8}
    assert optimizer.alpha == 1.0
    assert all(isinstance(optimizer.agreement[key], int) for key in ("agree", "conflict"))


@modes
def test_metrics_are_the_same_numbers(mode: str) -> None:
    optimizer = AlphaAdam([nn.Parameter(p) for p in tensors(0)], **MODES[mode])
    norm: dict[str, Any] = {"grad_norm": None} if "clipped" in mode else {}
    assert optimizer.metrics() == {"alpha": 1.0, "agreement": 1.0, "evidence": 0.0, "steps": 0.0, **norm}
    for grads in gradients(4):
        step_with(optimizer, grads)
    if norm:
        squares = [grad.double().square().sum() for grad in grads if grad is not None]
        norm["grad_norm"] = pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-6)
    steps, alpha, agree, conflict = memory_of(optimizer)
    numel = sum(p.numel() for p in parameters_of(optimizer))
    assert optimizer.metrics() == {
        "alpha": alpha, "agreement": agree / (agree + conflict), "evidence": (agree + conflict) / numel, "steps": steps,
        **norm,
    }  # fmt: skip
    assert steps == 4.0
    assert conflict > 0


def test_layer_alphas_have_the_names_of_the_parameters() -> None:
    named = [("module.a", nn.Parameter(torch.zeros(2))), ("module._orig_mod.b.w", nn.Parameter(torch.zeros(3)))]
    optimizer = AlphaAdam(named, scope="layer")
    step_with(optimizer, [torch.ones(2), torch.ones(3)])
    assert optimizer.alpha == {"a": 1.0, "b.w": 1.0}
    step_with(optimizer, [torch.tensor([1.0, -1]), torch.tensor([1.0, 1, -1])])
    assert optimizer.alpha == {"a": 2.0, "b.w": 1.5}
    unnamed = AlphaAdam([{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.zeros(2))]}])
    assert unnamed.alpha == 1.0


@modes
def test_named_parameters_give_the_same_numbers(mode: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    twin = Twin([{"params": list(model.parameters())}], **MODES[mode])
    optimizer = AlphaAdam(model.named_parameters(), **MODES[mode])
    for grads in gradients(5, shapes=[tuple(p.shape) for p in model.parameters()]):
        twin.step(grads)
        step_with(optimizer, grads)
    for a, b in zip(parameters_of(optimizer), parameters_of(twin.optimizer), strict=True):
        assert same_bits(a, b)
    if "scope" in MODES[mode]:
        assert isinstance(optimizer.alpha, dict)
        assert list(optimizer.alpha) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_two_parameters_of_one_name_are_refused() -> None:
    optimizer = AlphaAdam([("module.a", nn.Parameter(torch.zeros(2)))])
    optimizer.add_param_group({"params": [("module.a", nn.Parameter(torch.zeros(2)))]})
    with pytest.raises(ValueError, match=r"two parameters are named 'a'"):
        step_with(optimizer, [torch.ones(2), torch.ones(2)])


# ---- the state


@modes
def test_the_state_is_that_of_adamw(mode: str) -> None:
    optimizer = AlphaAdam([nn.Parameter(p) for p in tensors(0)], **MODES[mode])
    assert all(group["alphaadam_state"] == [0.0, 1.0, 0.0, 0.0] for group in optimizer.param_groups)
    for t, grads in enumerate(gradients(3), 1):
        step_with(optimizer, grads)
        for param in parameters_of(optimizer):
            state = optimizer.state[param]
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
            assert (state["step"].shape, state["step"].dtype, state["step"].device.type) == ((), torch.float32, "cpu")
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == param.shape
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == param.dtype
            assert float(state["step"]) == t
    states = [group["alphaadam_state"] for group in optimizer.state_dict()["param_groups"]]
    assert states == [[3.0, *memory_of(optimizer)[1:]]]


@modes
def test_a_step_without_evidence_leaves_the_memory(mode: str) -> None:
    twin = Twin(two_groups(), **MODES[mode])
    for grads in gradients(4):
        twin.step(grads)
    before = memory_of(twin.optimizer), twin.optimizer.alpha, twin.optimizer.agreement
    assert before[0][3] > 0
    for group in twin.optimizer.param_groups:
        group["lr"] = 0.0
    twin.step([torch.zeros(shape) for shape in SHAPES])
    assert (memory_of(twin.optimizer), twin.optimizer.alpha, twin.optimizer.agreement) == before
    for group in twin.optimizer.param_groups:
        group["lr"] = 1e-3
    for grads in gradients(4, seed=8):
        twin.step(grads)
    assert twin.differences() == []


# ---- no host synchronisation


class NoDeviceReads(TorchDispatchMode):
    """Fails where a tensor's value is read on the host, but for ``step``, which is a CPU tensor by design."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "_unique2", "masked_select")

    def __init__(self, optimizer: AlphaAdam) -> None:
        super().__init__()
        self.optimizer, self.seen = optimizer, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func._opname in self.READS:
            self.seen += 1
            steps = [state["step"] for state in self.optimizer.state.values()]
            assert any(args[0] is step for step in steps), f"{func} reads a value that may be on a device"
        return func(*args, **(kwargs or {}))


@modes
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_step_reads_no_device_value(mode: str, threshold: float) -> None:
    optimizer = AlphaAdam([nn.Parameter(p) for p in tensors(0)], threshold=threshold, **MODES[mode])
    step_with(optimizer, gradients(1)[0])  # the first one builds the layout
    for grads in gradients(3):
        with NoDeviceReads(optimizer) as reads:
            step_with(optimizer, grads)
        assert reads.seen == len(SHAPES)  # the mode sees what it has to see
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    with NoDeviceReads(optimizer), pytest.raises(AssertionError, match="may be on a device"):
        step_with(optimizer, gradients(1)[0])  # a tensor lr is read: the mode fails where it should


@modes
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_step_runs_on_tensors_without_values(mode: str, threshold: float) -> None:
    """The meta device has shapes and no data, so reading a value there is an error in torch itself."""
    optimizer = AlphaAdam([nn.Parameter(p.to("meta")) for p in tensors(0)], threshold=threshold, **MODES[mode])
    for grads in gradients(3):
        step_with(optimizer, [None if g is None else g.to("meta") for g in grads])
    assert float(optimizer.state[parameters_of(optimizer)[0]]["step"]) == 3.0
    with pytest.raises(RuntimeError):  # the statistics were on that device, not on the CPU
        _ = optimizer.agreement
