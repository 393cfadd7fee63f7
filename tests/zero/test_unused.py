"""Parameters that get no gradient in a step are left alone, as in one process: not counted, stepped or decayed.

DeepSpeed keeps the last gradient of such a parameter at stage 3 and under offload, and steps every flat as a whole.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer
from alphaadam_dist.zero import universal
from tests.checkpoint.test_universal import convert
from tests.marks import slow_but
from tests.models import Given, decay_groups, given_gradients
from tests.older import needs_universal_checkpoints
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_equality import MODES, OPTIONS, assert_equal, dtype_of

Program = list[list[dict[str, Tensor]]]
"""For each step its micro-batches: the gradients of those parameters that are used."""

STEPS, SAVED_AFTER = 12, 7


def program(micro_batches: int = 1) -> Program:
    """Every parameter is used in some steps and micro-batches only; "one" from step 4 on, "norm" up to there."""
    generator = torch.Generator().manual_seed(5)
    drawn = iter(given_gradients(STEPS * micro_batches))
    result = []
    for step in range(STEPS):
        batches = []
        for _ in range(micro_batches):
            gradients = next(drawn)
            used = {name for name in gradients if torch.rand((), generator=generator) < 0.6}
            used -= {"one"} if step < 4 else {"norm"}
            used |= {"embedding"} if step % 3 == 0 or not used else set()
            batches.append({name: gradient for name, gradient in gradients.items() if name in used})
        result.append(batches)
    return result


def under_deepspeed(
    config: dict[str, Any], options: dict[str, Any], steps: Program, optimizer: str = "AlphaAdam", *,
    folder: str = "", save: bool = False, load: str = "",
) -> dict[str, Any]:  # fmt: skip
    """All steps, or with ``load`` those after a checkpoint of that tag."""
    started = engine.start(Given(), config, options, True, optimizer)
    if load:
        path, _ = started.load_checkpoint(folder, tag=load)
        assert path is not None
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, batches in enumerate(steps[SAVED_AFTER:] if load else steps):
            for gradients in batches:
                started.backward(started(gradients))
                started.step()
            seen.append(engine.observe(started.basic_optimizer))
            if save and i + 1 == SAVED_AFTER:
                started.save_checkpoint(folder, tag="saved")
    said = [str(warning.message) for warning in caught if "got no gradient" in str(warning.message)]
    result = {"params": engine.masters(started), "seen": seen, "said": said}
    started.destroy()
    return result


def alone(
    options: dict[str, Any],
    steps: Program,
    optimizer: type[AlphaOptimizer] = AlphaAdam,
    mode: str = "zero2",
    zeros: bool = False,
) -> dict[str, Any]:
    """The same in one process; with ``zeros`` a gradient of zeros stands for a missing one."""
    model = Given().to(dtype_of(mode)).float()
    stepping = optimizer(decay_groups(model), **{"lr": engine.LR, **options})
    seen, updates = [], []
    for batches in steps:
        for gradients in batches:
            for name, gradient in gradients.items():
                param = getattr(model, name)
                share = gradient / len(batches)
                param.grad = share if param.grad is None else param.grad + share
        for param in model.parameters():
            if zeros and param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
        stepping.step()
        stepping.zero_grad()
        seen.append(engine.observe(stepping))
        updates.append({n: stepping.state[p].get("step", torch.zeros(())).item() for n, p in model.named_parameters()})
    params = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"params": params, "seen": seen, "updates": updates}


FAST = [("zero1", "layer"), ("zero2-offload", "exact"), ("zero2-offload", "delayed"), ("zero3-sub-groups", "exact")]
SERVED = [mode for mode in MODES if not mode.startswith("zero0") and mode != "zero1-bf16-fp32-accumulation"]
SLOW = [(mode, list(OPTIONS)[i % len(OPTIONS)]) for i, mode in enumerate(SERVED) if "accumulate" not in mode]


@pytest.mark.parametrize(
    ("mode", "options"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST)]
)
def test_two_ranks_equal_one_process(ranks2: Ranks, mode: str, options: str) -> None:
    steps = program()
    ranks = ranks2.run(under_deepspeed, MODES[mode], OPTIONS[options], steps)
    assert_equal(ranks, alone(OPTIONS[options], steps, mode=mode))
    assert all(rank["said"] == [] for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AlphaLion, AlphaSGD])
def test_the_family(ranks2: Ranks, kind: type[AlphaOptimizer]) -> None:
    steps = program()
    ranks = ranks2.run(under_deepspeed, MODES["zero3-sub-groups"], {}, steps, kind.__name__)
    assert_equal(ranks, alone({}, steps, kind))


MICRO: dict[str, dict[str, Any]] = {
    "zero1": engine.config(1, accumulate=2),
    "zero1-overlap": engine.config(1, accumulate=2, overlap_comm=True),
    "zero1-offload": engine.config(1, accumulate=2, offload=True),
    "zero2": engine.config(2, accumulate=2),
    "zero2-offload": engine.config(2, accumulate=2, offload=True),
    "zero3": engine.config(3, accumulate=2, sub_group_size=200),
    "zero3-offload": engine.config(3, accumulate=2, offload=True, sub_group_size=200),
}


@pytest.mark.parametrize("mode", slow_but(MICRO, "zero2-offload"))
def test_used_in_some_micro_batches(ranks2: Ranks, mode: str) -> None:
    """Not added to what stands there from the step before, and not lost where the last micro-batch has none."""
    steps = program(micro_batches=2)
    assert_equal(ranks2.run(under_deepspeed, MICRO[mode], {}, steps), alone({}, steps))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "zero3-offload"])
def test_clipping_forgets_old_gradients(ranks2: Ranks, mode: str) -> None:
    """The norm is that of this step's gradients alone; its order of summation is another than in one process."""
    steps, clip = program(), 1.0
    clipped = []
    for batches in steps:
        norm = torch.stack([g.double().square().sum() for g in batches[0].values()]).sum().sqrt().float()
        clipped.append([{n: g / ((norm + 1e-6) / clip).clamp(min=1.0) for n, g in batches[0].items()}])
    expected = alone({}, clipped)
    for result in ranks2.run(under_deepspeed, {**MODES[mode], "gradient_clipping": clip}, {}, steps):
        assert result["seen"] == expected["seen"]
        for name, param in expected["params"].items():
            torch.testing.assert_close(result["params"][name], param, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero1", "zero3-sub-groups"])
def test_a_checkpoint_knows_what_was_missed(ranks1: Ranks, ranks2: Ranks, tmp_path: Path, mode: str) -> None:
    """Each parameter has its own number of updates, also after a resume and through a universal checkpoint."""
    steps, folder = program(), str(tmp_path)
    expected = alone({}, steps)
    assert_equal(ranks2.run(under_deepspeed, MODES[mode], {}, steps, folder=folder, save=True), expected)
    expected["seen"] = expected["seen"][SAVED_AFTER:]
    assert_equal(ranks2.run(under_deepspeed, MODES[mode], {}, steps, folder=folder, load="saved"), expected)
    needs_universal_checkpoints(MODES[mode]["zero_optimization"]["stage"])
    convert(tmp_path)
    held = universal.read(tmp_path / "universal")
    updates = expected["updates"][SAVED_AFTER - 1]
    assert {name: step.item() for name, step in held.steps.items()} == {name: updates[name] for name in held.steps}
    config = {**MODES[mode], "checkpoint": {"load_universal": True}}
    assert_equal(ranks1.run(under_deepspeed, config, {}, steps, folder=folder, load="universal"), expected)


@pytest.mark.parametrize("mode", slow_but(["zero0", "zero0-bf16"], "zero0"))
def test_stage_zero_on_one_rank(ranks1: Ranks, mode: str) -> None:
    steps = program()
    assert_equal(ranks1.run(under_deepspeed, MODES[mode], {}, steps), alone({}, steps, mode=mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero0", "zero1-bf16-fp32-accumulation"])
def test_where_deepspeed_takes_zeros_it_is_said_once(ranks2: Ranks, mode: str) -> None:
    """One rank cannot tell what the others used, so DeepSpeed's zeros stay: no evidence, but decay and momentum."""
    steps = program()
    ranks = ranks2.run(under_deepspeed, MODES[mode], {}, steps)
    assert_equal(ranks, alone({}, steps, mode=mode, zeros=True))
    for rank in ranks:
        assert len(rank["said"]) == 1
        assert "DeepSpeed takes zeros for that" in rank["said"][0]


class Experts(nn.Module):
    """Ranks use one of two parameters each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.even = nn.Parameter(torch.randn(7, 3, generator=generator))
        self.odd = nn.Parameter(torch.randn(5, generator=generator))

    def forward(self, loss: Tensor, rank: int, gradients: dict[str, Tensor]) -> Tensor:
        name = "odd" if rank % 2 else "even"
        return loss + (getattr(self, name) * gradients[name]).sum()


class WithExperts(Given):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        own = {name: gradient for name, gradient in gradients.items() if "experts" not in name}
        experts = {name.removeprefix("experts."): gradients[name] for name in gradients.keys() - own.keys()}
        return self.experts(super().forward(own), dist.get_rank(), experts)


def with_leaf_module() -> dict[str, Any]:
    model = WithExperts()
    set_z3_leaf_modules(model, [Experts])
    started = engine.start(model, MODES["zero3-sub-groups"], {}, True, "AlphaAdam")
    seen = []
    for gradients in given_gradients(6, like=WithExperts()):
        started.backward(started(gradients))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    result = {"params": engine.masters(started), "seen": seen}
    started.destroy()
    return result


@pytest.mark.slow
def test_ranks_that_use_different_parts_of_a_leaf_module(ranks2: Ranks) -> None:
    """DeepSpeed takes zeros there where a rank has none, so the average over the ranks is what is stepped."""
    model = WithExperts()
    alone = AlphaAdam(decay_groups(model), lr=engine.LR)
    seen = []
    for gradients in given_gradients(6, like=model):
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.grad = gradients[name] / (2 if "experts" in name else 1)
        alone.step()
        seen.append(engine.observe(alone))
    params = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert_equal(ranks2.run(with_leaf_module), {"params": params, "seen": seen})
