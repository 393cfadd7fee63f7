"""Tests of the test: the library broken on purpose, and the checker must go red on a program of ``make test``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from alphaadam_dist import AlphaAdam, AlphaLion, layout, local_tensors, optimizer, rule, statistics
from alphaadam_dist.shards import Shard, dtensor

from . import checker
from .programs import Unit, program

Patch = pytest.MonkeyPatch


def local_alpha(patch: Patch) -> None:
    patch.setattr(statistics.Statistics, "_all_reduce", lambda *args, **kwargs: None)


def clip_by_one_rank(patch: Patch) -> None:
    add = statistics.Statistics.add_norms

    def on_rank_zero(self: Any, *args: Any) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            add(self, *args)

    patch.setattr(statistics.Statistics, "add_norms", on_rank_zero)


def owned_twice(patch: Patch) -> None:
    """A coordinate on a replicated mesh dimension taken for a part of the parameter."""

    def every_coordinate(param: DTensor, key: str) -> list[Shard]:
        part = tuple(enumerate(param.device_mesh.get_coordinate() or ()))
        return [Shard(key, part, 0, param.to_local().numel(), param.numel())]

    patch.setattr(dtensor, "shards", every_coordinate)
    patch.setattr(layout, "_prove_coverage", lambda *args: None)


def steps_counted_twice(patch: Patch) -> None:
    opened = statistics.Statistics.open

    def twice(self: Any, layout: Any) -> None:
        opened(self, layout)
        self._applied = self._applied + 1

    patch.setattr(statistics.Statistics, "open", twice)


def delayed_by_two_steps(patch: Patch) -> None:
    opened = statistics.Statistics.open

    def late(self: Any, layout: Any) -> None:
        older = self._memory.clone()  # before the last step's counts have arrived
        opened(self, layout)
        if self.options.sync == "delayed":
            self._alpha = self._alpha_of(older[2:])

    patch.setattr(statistics.Statistics, "open", late)


def saved_without_steps(patch: Patch) -> None:
    def publish(self: Any) -> None:
        self._put([0.0, *self._adopt().state()[1:]])

    patch.setattr(optimizer.AlphaOptimizer, "_publish", publish)


def threshold_of_the_other_sign(patch: Patch) -> None:
    def classify(grad: Tensor, momentum: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
        conflict = momentum * grad < threshold * grad.square()
        return (grad != 0) & ~conflict, (grad != 0) & conflict

    patch.setattr(rule, "classify", classify)


def zeros_agree(patch: Patch) -> None:
    judged = rule.classify

    def classify(*args: Any) -> tuple[Tensor, Tensor]:
        _, conflict = judged(*args)
        return ~conflict, conflict

    patch.setattr(rule, "classify", classify)


def warmup_one_step_late(patch: Patch) -> None:
    strengths = rule.strengths
    patch.setattr(rule, "strengths", lambda alpha, applied, *rest: strengths(alpha, applied - 1, *rest))


def decay_masked(patch: Patch) -> None:
    def masked(param: Tensor, grad: Tensor, *rest: Any, weight_decay: float, lr: Any, **more: Any) -> None:
        param.mul_(1 - lr * weight_decay * rest[-1])
        rule.adam_(param, grad, *rest, weight_decay=0.0, lr=lr, **more)

    patch.setattr(AlphaAdam, "direction", staticmethod(masked))


def lion_by_the_new_momentum(patch: Patch) -> None:
    def late(param: Tensor, grad: Tensor, m: Tensor, f: Tensor, *, lr: Any, betas: Any, weight_decay: float) -> None:
        param.mul_(1 - lr * weight_decay)
        m.lerp_(grad, 1 - betas[1])
        param.sub_(m.sign() * f * lr)

    patch.setattr(AlphaLion, "direction", staticmethod(late))


def bias_corrected_by_the_next_step(patch: Patch) -> None:
    steps = local_tensors.LocalTensors.advance_steps
    patch.setattr(local_tensors.LocalTensors, "advance_steps", lambda *args, **of: [t + 1 for t in steps(*args, **of)])


def none_is_zero(patch: Patch) -> None:
    given = local_tensors.gradient

    def zeros(param: Tensor) -> Tensor | None:
        return given(param) if param.grad is not None else torch.zeros_like(local_tensors.local(param))

    patch.setattr(local_tensors, "gradient", zeros)


FAULTS: dict[Callable[[Patch], None], Callable[[Unit], bool]] = {
    local_alpha: lambda unit: unit.regime in ("fsdp2", "by-hand"),
    clip_by_one_rank: lambda unit: unit.options["clip_norm"] is not None,
    owned_twice: lambda unit: unit.regime in ("dtensors", "hsdp"),
    steps_counted_twice: lambda unit: True,
    delayed_by_two_steps: lambda unit: unit.options["sync"] == "delayed",
    saved_without_steps: lambda unit: True,
    threshold_of_the_other_sign: lambda unit: unit.options["threshold"] > 0,
    zeros_agree: lambda unit: True,
    warmup_one_step_late: lambda unit: unit.options["alpha_warmup"] > 1,
    decay_masked: lambda unit: unit.kind == "AlphaAdam",
    lion_by_the_new_momentum: lambda unit: unit.kind == "AlphaLion",
    bias_corrected_by_the_next_step: lambda unit: unit.kind == "AlphaAdam",
    none_is_zero: lambda unit: True,
}
"""Each fault, and the units that can show it. On the reference kernels, for the compiled ones are not patched, and
without ``verify_every``, which sees some of them first."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_seen(monkeypatch: Patch, fault: Callable[[Patch], None]) -> None:
    suspects = [
        one
        for one in map(program, range(100))
        if any(not unit.fused and not unit.verify_every and FAULTS[fault](unit) for unit in one.units)
    ]
    fault(monkeypatch)
    for i, suspect in enumerate(suspects):
        wrong = checker.fault_of(suspect)
        if wrong is not None:
            assert "by the rule" in wrong or "bits" in wrong, f"it is red for another reason: {wrong}"
            print(i)
            return
    pytest.fail(f"none of {len(suspects)} programs saw it")


def test_what_fails_is_made_small_and_printed_with_the_way_to_repeat_it(monkeypatch: Patch) -> None:
    warmup_one_step_late(monkeypatch)
    seed = next(seed for seed in range(100) if checker.fault_of(program(seed)))
    with pytest.raises(checker.Wrong) as wrong:
        checker.check(seed)
    text = str(wrong.value)
    assert f"python -m tests.faults.checker {seed}" in text
    assert text.count("step(salt=") < str(program(seed)).count("step(salt=")
