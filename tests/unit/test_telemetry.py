"""telemetry: the norms of the whole model's gradient and of its update, against plain differences in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _init_optim_state

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer
from alphaadam_dist.statistics import Statistics

from .problems import gradients, parameters_of, same_bits, step_with, tensors

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "layer": {"scope": "layer"},
    "threshold": {"threshold": 0.1},
    "clipped": {"clip_norm": 2.0},
    "clipped, with a threshold": {"clip_norm": 2.0, "threshold": 0.1},
    "skipping": {"skip_nonfinite": True},
    "bf16 state": {"state_dtype": "bfloat16"},
    "maximize": {"maximize": True, "alpha_warmup": 3},
    "no masks, clipped": {"gamma": 1.0, "clip_norm": 2.0},
    "delayed": {"sync": "delayed"},
    "delayed, bf16 state": {"sync": "delayed", "state_dtype": "bfloat16", "threshold": 0.1},
    "no masks": {"gamma": 1.0},
    "no masks, delayed": {"gamma": 1.0, "sync": "delayed"},
}
READ_FIRST = [name for name in MODES if name[:7] != "delayed" and name not in ("no masks", "no masks, delayed")]
KINDS: list[Any] = [AlphaAdam, AlphaLion, AlphaSGD]


def build(kind: Any = AlphaAdam, dtype: torch.dtype = torch.float32, **options: Any) -> AlphaOptimizer:
    made: AlphaOptimizer = kind([nn.Parameter(p) for p in tensors(0, dtype)], lr=1e-2, weight_decay=0.1, **options)
    return made


def norm_of(held: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(one.detach().double().square().sum()) for one in held if one is not None))


def played(optimizer: AlphaOptimizer, steps: list[list[Tensor | None]]) -> list[tuple[float, float, Any, Any]]:
    """Of each step the norms of its gradient and of new minus old parameters, then what metrics() says of them."""
    seen = []
    for grads in steps:
        before = [param.detach().clone() for param in parameters_of(optimizer)]
        step_with(optimizer, grads)
        moved = [now.double() - was.double() for now, was in zip(parameters_of(optimizer), before, strict=True)]
        told = optimizer.metrics()
        seen.append((norm_of(grads), norm_of(moved), told["grad_norm"], told["update_norm"]))
    return seen


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_norms_are_those_of_plain_differences(mode: str, kind: Any, fused: bool) -> None:
    """Before clipping, decay included; a step that reads all gradients first knows the update of the one before."""
    optimizer = build(kind, telemetry=True, fused=fused, **MODES[mode])
    assert (optimizer.metrics()["grad_norm"], optimizer.metrics()["update_norm"]) == (None, None)
    seen = played(optimizer, gradients(5, absent=0.2))
    assert [told for *_, told, _ in seen] == [pytest.approx(norm, rel=1e-12) for norm, *_ in seen]
    moved = [norm for _, norm, *_ in seen]
    late = [None, *moved[:-1]] if mode in READ_FIRST else moved
    assert [told for *_, told in seen] == [norm and pytest.approx(norm, rel=1e-12) for norm in late]
    assert min(moved) > 0


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
def test_a_bf16_parameter_moves_by_what_is_left_after_rounding(fused: bool) -> None:
    options = {"state_dtype": "bfloat16", "sync": "delayed", "telemetry": True, "fused": fused}
    seen = played(build(dtype=torch.bfloat16, **options), gradients(4, torch.bfloat16))
    assert [told for *_, told in seen] == [pytest.approx(norm, rel=1e-12) for _, norm, *_ in seen]


@pytest.mark.parametrize("mode", MODES)
def test_telemetry_changes_no_bit(mode: str) -> None:
    ends = []
    for telemetry in (False, True):
        optimizer = build(telemetry=telemetry, fused=True, **MODES[mode])
        for grads in gradients(5):
            step_with(optimizer, grads)
        state = [value for param in parameters_of(optimizer) for value in optimizer.state[param].values()]
        ends.append(([*parameters_of(optimizer), *state], optimizer.metrics()))
    assert all(same_bits(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert ends[1][1].items() >= ends[0][1].items()
    assert set(ends[1][1]) - set(ends[0][1]) <= {"grad_norm", "update_norm"}
    assert "update_norm" not in ends[0][1]


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"threshold": 0.1, "clip_norm": 2.0}], ids=str)
def test_a_skipped_step_leaves_the_norm_of_the_last_applied_one(options: dict[str, Any]) -> None:
    optimizer = build(telemetry=True, skip_nonfinite=True, **options)
    steps = gradients(7)
    for step in (0, 3, 4):
        steps[step][0] = torch.full_like(tensors(0)[0], math.nan)
    seen = played(optimizer, steps)
    moved = [norm for _, norm, *_ in seen]
    assert [norm == 0 for norm in moved] == [True, False, False, True, True, False, False]
    expected = [None, None, moved[1], moved[2], moved[2], moved[2], moved[5]]
    assert [told for *_, told in seen] == [norm and pytest.approx(norm, rel=1e-12) for norm in expected]
    assert optimizer.metrics()["skipped"] == 3


@pytest.mark.parametrize("mode", ["exact", "delayed", "no masks", "skipping"])
def test_a_loaded_run_does_not_know_the_norms(mode: str) -> None:
    """Nor those of the step by which torch's checkpoint functions make a state to load into."""
    saved = build(telemetry=True, **MODES[mode])
    played(saved, gradients(3))
    resumed = build(telemetry=True, **MODES[mode])
    _init_optim_state(resumed)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert (resumed.metrics()["grad_norm"], resumed.metrics()["update_norm"]) == (None, None)
    seen = played(resumed, gradients(2))
    expected = [None, seen[0][1]] if mode in READ_FIRST else [norm for _, norm, *_ in seen]
    assert [told for *_, told in seen] == [norm and pytest.approx(norm, rel=1e-12) for norm in expected]


def test_an_option_switched_on_in_mid_run() -> None:
    """Numbers in flight are of the step that sent them."""
    optimizer = build(sync="delayed")
    steps = gradients(4)
    step_with(optimizer, steps[0])
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["telemetry"] = True
    assert optimizer.metrics()["update_norm"] is None
    seen = played(optimizer, steps[1:])
    assert [told for *_, told in seen] == [pytest.approx(norm, rel=1e-12) for _, norm, *_ in seen]


def test_one_tensor_that_no_kernel_takes_counts_too() -> None:
    """A parameter with gaps in its memory goes to the reference alone."""
    whole = torch.randn(40, 8)
    params = [nn.Parameter(torch.randn(1100, 1000)), nn.Parameter(whole[:, ::2])]
    optimizer = AlphaAdam(params, lr=1e-2, telemetry=True, sync="delayed")
    seen = played(optimizer, [[torch.randn_like(param) for param in params] for _ in range(2)])
    assert [told for *_, told in seen] == [pytest.approx(norm, rel=1e-12) for _, norm, *_ in seen]


@pytest.mark.parametrize("mode", ["exact", "clipped", "delayed", "no masks"])
def test_step_reads_nothing_on_the_host(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way from the statistics to the host goes through a method that metrics() alone calls."""

    def read(self: Tensor) -> float:
        if self.dtype == torch.float64:  # that of all statistics, and of nothing else in a step
            raise AssertionError("a statistic was read")
        return item(self)

    optimizer = build(telemetry=True, fused=False, **MODES[mode])
    item = Tensor.item
    with monkeypatch.context() as patch:
        for name in ("item", "__float__", "__bool__", "__int__", "tolist"):
            patch.setattr(Tensor, name, read)
        for grads in gradients(3):
            step_with(optimizer, grads)
        with pytest.raises(AssertionError, match="a statistic was read"):
            optimizer.metrics()
    assert optimizer.metrics()["update_norm"]


def test_what_is_sent_is_two_numbers_more() -> None:
    """Nothing more without it, and nothing at all with gamma=1."""
    sizes = {}
    for mode in ("exact", "layer", "clipped", "delayed", "no masks", "no masks, clipped"):
        for telemetry in (False, True):
            optimizer = build(telemetry=telemetry, **MODES[mode])
            step_with(optimizer, gradients(1)[0])
            statistics = optimizer._run.statistics
            assert isinstance(statistics, Statistics)
            sizes[mode, telemetry] = len(statistics._buffer)
    assert [sizes[mode, False] for mode in ("exact", "layer", "clipped", "delayed")] == [2, 12, 3, 2]
    assert [sizes[mode, False] for mode in ("no masks", "no masks, clipped")] == [0, 1]
    assert [sizes[mode, True] for mode in ("exact", "layer", "clipped", "delayed")] == [4, 14, 4, 4]
    assert [sizes[mode, True] for mode in ("no masks", "no masks, clipped")] == [2, 2]


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}], ids=str)
def test_the_step_in_backward_has_the_same_norms(options: dict[str, Any]) -> None:
    told = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        optimizer = AlphaAdam(model.named_parameters(), lr=1e-2, sync="delayed", telemetry=True, **options)
        if in_backward:
            optimizer.step_in_backward(model)
        norms = []
        for _ in range(3):
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            norms += [optimizer.metrics()["grad_norm"], optimizer.metrics()["update_norm"]]
        told.append(norms)
    assert told[1] == pytest.approx(told[0], rel=1e-12)
    assert min(told[0]) > 0


def test_one_optimizer_per_parameter_does_not_know_the_whole_model() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
    optimizers = [AlphaAdam([param], scope="layer", telemetry=True) for param in params]

    def step_each() -> None:
        torch.stack([param.square().sum() for param in params]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    step_each()
    with pytest.raises(ValueError, match=r"telemetry=True.*'layer' without clip_norm, alpha_warmup and telemetry"):
        step_each()
