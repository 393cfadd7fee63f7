"""AlphaAdam on flat vectors cut in two over two ranks: the bits, and the properties, of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from alphaadam_dist.statistics import Statistics

from ..ranks import Ranks
from .collectives import Collectives
from .flats import LENGTHS, differences, flats, mine, pair, steps_of
from .problems import memory_of, parameters_of, same_bits, step_with

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, threshold": {"threshold": 0.1},
    "delayed": {"sync": "delayed"},
    "delayed, threshold": {"sync": "delayed", "threshold": 0.1},
    "warming": {"alpha_warmup": 6, "gamma": 0.3},
    "maximize": {"maximize": True},
}
modes = pytest.mark.parametrize("mode", MODES)

# ---- a flat vector cut in two


def cut_in_two(options: dict[str, Any]) -> tuple[list[str], list[list[tuple[str, int]]], list[float]]:
    cut, whole = pair(**options)
    calls = []
    for grads in steps_of(10):
        with Collectives() as seen:
            step_with(cut, [mine(g) for g in grads])
        calls.append(seen.calls)
        step_with(whole, grads)
    return differences(cut, whole), calls, memory_of(cut)


@modes
def test_a_cut_flat_has_the_bits_of_the_whole(ranks2: Ranks, mode: str) -> None:
    answers = ranks2.run(cut_in_two, MODES[mode])
    for wrong, calls, memory in answers:
        assert wrong == []
        assert all(step == [("allreduce", 16)] for step in calls[1:])
        assert memory[0] == 10.0
        assert memory[3] > 0
    assert answers[0][2] == answers[1][2]


def clipped(threshold: float) -> tuple[float, list[bool], int, list[float]]:
    """Largest relative deviation of the moments, whether counts agree, collectives in a step, alphas."""
    cut, whole = pair(clip_norm=1.0, threshold=threshold)
    same, alphas = [], []
    for grads in steps_of(8):
        with Collectives() as seen:
            step_with(cut, [mine(g) for g in grads])
        step_with(whole, grads)
        same.append(memory_of(cut) == memory_of(whole))
        alphas.append(memory_of(cut)[1])
    worst = 0.0
    for p, q in zip(parameters_of(cut), parameters_of(whole), strict=True):
        a, b = cut.state[p]["exp_avg"], mine(whole.state[q]["exp_avg"])
        worst = max(worst, float(((a - b).norm() / b.norm()) if len(b) else 0))
    return worst, same, len(seen.calls), alphas


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_clipping_needs_the_norm_of_the_whole(ranks2: Ranks, threshold: float) -> None:
    answers = ranks2.run(clipped, threshold)
    for worst, same, calls, _ in answers:
        # The norm is summed in another order: one bit of float64, which may become one bit of a float32 coefficient.
        assert worst < 1e-6
        assert all(same)
        assert calls == (2 if threshold else 1)  # a threshold must know the norm before it can count
    assert answers[0][3] == answers[1][3]


def clipped_far_apart() -> float:
    """Rank 1's gradients are a thousand times larger: clipping by a local norm would leave rank 0 unclipped."""
    cut, whole = pair(clip_norm=0.1, gamma=1.0)
    for grads in steps_of(3):
        large = [g * torch.where(torch.arange(len(g)) < int(0.37 * len(g)), 1.0, 1e3) for g in grads]
        step_with(cut, [mine(g) for g in large])
        step_with(whole, large)
    p, q = parameters_of(cut)[0], parameters_of(whole)[0]
    a, b = cut.state[p]["exp_avg"], mine(whole.state[q]["exp_avg"])
    return float((a - b).norm() / b.norm())


def test_every_rank_clips_by_the_same_norm(ranks2: Ranks) -> None:
    assert max(ranks2.run(clipped_far_apart)) < 1e-6  # as above


# ---- the properties of the rule, over two ranks


def against_adamw(case: str, options: dict[str, Any]) -> bool:
    """Whether the parts have the bits of AdamW on the whole."""
    cut, _ = pair(gamma=1.0 if case == "gamma" else 0.0, **options)
    theirs = torch.optim.AdamW(
        [nn.Parameter(p) for p in flats()], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), foreach=False
    )
    steps = steps_of(1 if case == "first step" else 8)
    if case == "same signs":
        steps = [[g.abs() for g in step] for step in steps]
    for grads in steps:
        step_with(cut, [mine(g) for g in grads])
        step_with(theirs, grads)
    return all(same_bits(p, mine(q.detach())) for p, q in zip(parameters_of(cut), parameters_of(theirs), strict=True))


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"threshold": 0.1}], ids=str)
@pytest.mark.parametrize("case", ["gamma", "same signs", "first step"])
def test_without_conflict_it_is_adamw(ranks2: Ranks, case: str, options: dict[str, Any]) -> None:
    assert ranks2.run(against_adamw, case, options) == [True, True]


def mean_of_f(gamma: float) -> tuple[float, int]:
    """Sum of f over this rank's evidence in the last step, read off the movement, and its size."""
    hyper: dict[str, Any] = {"weight_decay": 0.0, "eps": 1e-12, "lr": 1e-3, "alpha_max": 1e3}
    starts = [torch.zeros(n, dtype=torch.float64) for n in LENGTHS]
    ours, adamw = (
        AlphaAdam([nn.Parameter(mine(p)) for p in starts], sharding="sharded", gamma=g, **hyper) for g in (gamma, 1.0)
    )
    steps = [[g.double() for g in step] for step in steps_of(6)]
    for grads in steps:
        for optimizer in (ours, adamw):
            for p in parameters_of(optimizer):
                p.data.zero_()
            step_with(optimizer, [mine(g) for g in grads])
    total, count = 0.0, 0
    for p, q, g in zip(parameters_of(ours), parameters_of(adamw), steps[-1], strict=True):
        evidence = mine(g) != 0
        total += float((p.data / q.data)[evidence].sum())
        count += int(evidence.sum())
    return total, count


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_the_mean_of_f_over_the_evidence_of_all_ranks_is_one(ranks2: Ranks, gamma: float) -> None:
    (a, n), (b, m) = ranks2.run(mean_of_f, gamma)
    assert (a + b) / (n + m) == pytest.approx(1, abs=1e-12)  # some hundred roundings of float64
    assert abs(a / n - 1) > 1e-3  # over one rank alone it is not


def counts_at_scale(exponent: int) -> list[list[float]]:
    cut, _ = pair()
    seen = []
    for grads in steps_of(6):
        step_with(cut, [mine(g) * 2.0**exponent for g in grads])
        seen.append(memory_of(cut))
    return seen


def test_the_scale_of_gradients_does_not_reach_counts_or_alpha(ranks2: Ranks) -> None:
    plain, large, small = (ranks2.run(counts_at_scale, exponent) for exponent in (0, 20, -20))
    assert plain[0] == plain[1]
    assert plain == large == small


def padded_on_one_rank(rank: int) -> list[str]:
    """One rank's flats end in 9 elements of padding, as ZeRO's partitions do."""
    padding = torch.zeros(9 if dist.get_rank() == rank else 0)
    cut, whole = pair(sync="delayed")
    longer = AlphaAdam(
        [nn.Parameter(torch.cat([mine(p), padding])) for p in flats()],
        sharding="sharded", sync="delayed", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99),
    )  # fmt: skip
    for grads in steps_of(6):
        step_with(longer, [torch.cat([mine(g), padding]) for g in grads])
        step_with(cut, [mine(g) for g in grads])
        step_with(whole, grads)
    wrong = [] if memory_of(longer) == memory_of(cut) else [f"memory {memory_of(longer)} and {memory_of(cut)}"]
    for i, (p, q) in enumerate(zip(parameters_of(longer), parameters_of(cut), strict=True)):
        wrong += [] if same_bits(p[: len(q)], q) and not p[len(q) :].any() else [f"parameter {i}"]
    return wrong + differences(cut, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_padding_counts_nowhere(ranks2: Ranks, rank: int) -> None:
    assert ranks2.run(padded_on_one_rank, rank) == [[], []]


def nan_and_inf(options: dict[str, Any]) -> tuple[list[str], int]:
    """NaN on rank 1 only, inf on rank 0 only: what differs from AdamW in where they end, and how many end here."""
    cut, whole = pair(**options)
    theirs = torch.optim.AdamW([nn.Parameter(p) for p in flats()], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    for t, grads in enumerate(steps_of(6)):
        if t == 2:
            grads[0][90], grads[0][5] = math.nan, math.inf
        step_with(cut, [mine(g) for g in grads])
        step_with(whole, grads)
        step_with(theirs, grads)
    wrong, count = [], 0
    for p, q in zip(parameters_of(cut), parameters_of(theirs), strict=True):
        wrong += [] if torch.equal(p.isnan(), mine(q.detach()).isnan()) and not p.isinf().any() else ["nan"]
        count += int(p.isnan().sum())
    return wrong + ([] if memory_of(cut) == memory_of(whole) else ["memory"]), count


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"threshold": 0.1}], ids=str)
def test_nan_and_inf_stay_where_they_are(ranks2: Ranks, options: dict[str, Any]) -> None:
    assert ranks2.run(nan_and_inf, options) == [([], 1), ([], 1)]


def without_evidence_on(rank: int, how: str) -> list[str]:
    """One rank's gradients are zero in every second step, or all None in the last: it must still take part."""
    cut, whole = pair()
    at = [int(0.37 * n) for n in LENGTHS]
    for t, grads in enumerate(steps_of(6)):
        local: Sequence[Tensor | None] = [mine(g) for g in grads]
        if t == 5 or (t % 2 and how == "zero"):
            kept = [(torch.arange(n) >= a) == (rank == 0) for n, a in zip(LENGTHS, at, strict=True)]
            grads = [g * k for g, k in zip(grads, kept, strict=True)]
            if dist.get_rank() == rank:
                local = [torch.zeros_like(p) if how == "zero" else None for p in parameters_of(cut)]
        step_with(cut, local)
        step_with(whole, grads)
    wrong = differences(cut, whole)
    # what is None is not updated, so there only the statistics are those of the whole
    return [text for text in wrong if "memory" in text] if how == "none" and dist.get_rank() == rank else wrong


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["zero", "none"])
def test_a_rank_without_evidence_takes_part(ranks2: Ranks, rank: int, how: str) -> None:
    assert ranks2.run(without_evidence_on, rank, how) == [[], []]


# ---- the test can fail


def broken(options: dict[str, Any]) -> list[str]:
    """As cut_in_two, without the all-reduce."""
    real = Statistics._all_reduce
    Statistics._all_reduce = lambda self, tensor, async_op=False: None  # type: ignore[method-assign]
    try:
        return cut_in_two(options)[0]
    finally:
        Statistics._all_reduce = real  # type: ignore[method-assign]


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}], ids=str)
def test_without_the_all_reduce_the_equality_fails(ranks2: Ranks, options: dict[str, Any]) -> None:
    for wrong in ranks2.run(broken, options):
        assert any(text.startswith("memory") for text in wrong)
        assert "parameter 0" in wrong
