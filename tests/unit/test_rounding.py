"""Stochastic rounding by a counter: published vectors, the fixed format, no bias, the edges, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, rounding
from alphaadam_dist.optimizer import AlphaOptimizer
from alphaadam_dist.rounding import Positions, consecutive, key_of, philox, random_bits, rounded

from .problems import Twin, gradients, same_bits, step_with, tensors

KINDS: dict[str, type[AlphaOptimizer]] = {"adam": AlphaAdam, "lion": AlphaLion, "sgd": AlphaSGD}
MODES: dict[str, dict[str, Any]] = {
    "exact": {}, "delayed": {"sync": "delayed", "alpha_warmup": 3}, "layer": {"scope": "layer", "gamma": 0.2},
    "threshold": {"threshold": 0.1, "maximize": True}, "clipped": {"clip_norm": 2.0}, "seed": {"rounding_seed": 2**63},
}  # fmt: skip
LOWEST, HIGHEST = 0, 65535
LARGEST = 3.3895313892515355e38  # of bf16


def bits_of(count: int, n: int = 1, tensor: int = 0, start: int = 0) -> Tensor:
    return random_bits(key_of(0, "weight"), consecutive(start, count), count, n=n, tensor=tensor)


# ---- the random bits


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123, the authors' own
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)  # fmt: skip
def test_philox_gives_the_published_numbers(counter: list[int], key: int, words: list[int]) -> None:
    assert [int(word) for word in philox(counter, key)] == words


def test_the_format_is_fixed() -> None:
    """Golden values of docs/algorithm.md: a change of any is another format."""
    assert rounding.FORMAT == 1
    assert key_of(0, "model.embed_tokens.weight") == 0xBEEC43211DF2782E
    assert key_of(2**64 - 1, "") == 0x2D0E9DDC2DFD74DD
    far = 5 * 2**32 * 8 + 1234
    assert bits_of(4).tolist() == [40823, 34194, 22645, 15172]
    assert bits_of(4, n=7, tensor=2, start=far).tolist() == [30782, 34203, 23955, 60390]


def test_bits_by_the_text_of_the_format() -> None:
    """Written anew from docs/algorithm.md, one element at a time."""
    key = key_of(3, "layer")
    made = random_bits(key, consecutive(100, 400), 400, n=9, tensor=1).tolist()
    for i in (*range(100, 140), 255, 256, 257, 383, 384, 499):
        call, lane = i // 128 * 16 + i % 16, i % 128 // 16
        word = int(philox([call & 0xFFFFFFFF, call >> 32, 9, 1], key)[lane // 2])
        assert made[i - 100] == (word >> 16 if lane % 2 else word & 0xFFFF)


@pytest.mark.parametrize("slice_of", [40, 1000, 2**16])
def test_an_element_has_its_bits_in_every_cut(slice_of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bits_of(10_000).view(100, 100)
    monkeypatch.setattr(rounding, "SLICE", slice_of)
    key = key_of(0, "weight")
    for rows, columns in (
        (slice(20, 50), slice(30, 47)),
        (slice(0, 1), slice(0, 100)),
        (slice(3, 100), slice(99, 100)),
    ):
        part = whole[rows, columns]
        at = Positions(rows.start * 100 + columns.start, part.shape[1], 100)
        assert torch.equal(random_bits(key, at, part.numel(), n=1, tensor=0), part.reshape(-1))
    for start, end in ((0, 1), (17, 17), (127, 129), (37, 9_000)):
        assert torch.equal(bits_of(end - start, start=start), whole.view(-1)[start:end])


def test_everything_that_names_an_element_changes_its_bits() -> None:
    one = bits_of(4096)
    others = [
        bits_of(4096, n=2), bits_of(4096, tensor=1), bits_of(4096, start=4096),
        random_bits(key_of(1, "weight"), consecutive(0, 4096), 4096, n=1, tensor=0),
        random_bits(key_of(0, "weights"), consecutive(0, 4096), 4096, n=1, tensor=0),
    ]  # fmt: skip
    for other in others:
        assert (one == other).float().mean() < 0.01


# ---- the rounding of a given value


def test_rounding_has_no_bias() -> None:
    """Over many steps the mean error of each value is within five of its standard errors."""
    values = torch.randn(512, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 12, 1 / 16)
    below, above = (rounded(values, torch.full((512,), bits)).double() for bits in (LOWEST, HIGHEST))
    share = ((values.double() - below) / (above - below)).clamp(0, 1)
    common = (share > 0.02) & (share < 0.98)  # so rare a rounding says little in so few steps
    errors = torch.stack([rounded(values, bits_of(512, n)).double() - values for n in range(1, 1001)])
    standard = (above - below).abs() * (share * (1 - share) / 1000).sqrt()
    assert common.sum() > 450
    assert (errors.mean(0).abs() <= 5 * standard)[common].all()


def test_the_mean_over_all_bits_is_the_value_itself() -> None:
    bits = torch.arange(2**16)
    for value in (1.00390625001, -3.3, 7.7e-39, 2.9e30, 1.0):
        single = torch.tensor(value)
        assert rounded(single.expand(2**16).contiguous(), bits).double().mean() == single.double()


def test_what_bf16_holds_stays_and_every_nan_is_one() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for bits in (LOWEST, 12345, HIGHEST):
        kept = rounded(every.float(), torch.full((2**16,), bits))
        assert same_bits(kept[~every.isnan()], every[~every.isnan()])
        assert (kept[every.isnan()].view(torch.int16) == 0x7FC0).all()
    low_payload = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    assert int(rounded(low_payload, torch.zeros(1, dtype=torch.int64)).view(torch.int16)) == 0x7FC0


def test_nothing_finite_becomes_infinite_and_no_sign_flips() -> None:
    top = torch.finfo(torch.float32).max
    values = torch.tensor([LARGEST, 3.38e38, 3.4e38, top, 1e-45, 1e-40, 9.2e-41, 1.5, 0.0])
    for sign, bits in ((1, LOWEST), (1, HIGHEST), (-1, LOWEST), (-1, HIGHEST)):
        kept = rounded(sign * values, torch.full((9,), bits)).float()
        assert kept.isfinite().all()
        assert (kept.signbit() == (sign * values).signbit()).all()
        assert (kept[2:4].abs() == LARGEST).all()
    infinite = torch.tensor([float("inf"), -float("inf")])
    assert torch.equal(rounded(infinite, torch.full((2,), HIGHEST)).float(), infinite)


def test_only_denormals_round_to_zero() -> None:
    """So the masks, which read the moment's sign, see the sign that it had in fp32."""
    normal = torch.tensor([1.1754943508222875e-38, 2.3e-38, 1e-30])
    assert (rounded(normal, torch.full((3,), LOWEST)) > 0).all()
    denormal = torch.tensor([1e-42])
    assert float(rounded(denormal, torch.tensor([LOWEST]))) == 0
    assert float(rounded(denormal, torch.tensor([HIGHEST]))) > 0


# ---- the step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_computes_the_rule(kind: str, mode: str, dtype: torch.dtype) -> None:
    weights = tensors(0, dtype)
    groups = [{"params": weights[:2], "lr": 3e-2, "weight_decay": 0.3}, {"params": weights[2:]}]
    twin = Twin(groups, KINDS[kind], lr=1e-2, weight_decay=0.1, state_dtype="bfloat16", **MODES[mode])
    for grads in gradients(10, dtype, absent=0.2):
        twin.step(grads)
    assert twin.differences() == []
    assert twin.memory.conflict > 0
    assert twin.memory.n == 10
    for state in twin.optimizer.state.values():
        assert all(state[name].dtype == torch.bfloat16 for name in twin.optimizer.moments)


def second_moment(state_dtype: str | None, dtype: torch.dtype) -> Tensor:
    """exp_avg_sq after 1500 steps whose squared gradients fall to a hundredth after the first 500."""
    param = torch.nn.Parameter(torch.zeros(256, dtype=dtype))
    optimizer = AlphaAdam([("weight", param)], lr=1e-9, betas=(0.9, 0.999), state_dtype=state_dtype)
    generator = torch.Generator().manual_seed(0)
    for step in range(1500):
        param.grad = (torch.randn(256, generator=generator) * (1.0 if step < 500 else 0.1)).to(dtype)
        optimizer.step()
    held: Tensor = optimizer.state[param]["exp_avg_sq"]
    return held.float()


@pytest.mark.slow
def test_a_slow_moment_follows_its_twin_where_nearest_rounding_stands_still() -> None:
    twin = second_moment(None, torch.float32)
    stochastic = second_moment("bfloat16", torch.bfloat16)
    nearest = second_moment(None, torch.bfloat16)  # torch's own rounding
    assert abs(float(stochastic.mean() / twin.mean()) - 1) < 0.02
    assert float(nearest.mean() / twin.mean()) > 1.5


def test_the_count_of_steps_moves_with_every_step_but_those_that_make_state() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AlphaAdam([param], lr=0.0, state_dtype="bfloat16")

    def n() -> int:
        held: int = optimizer.state_dict()["param_groups"][0]["alphaadam_rounding"][1]
        return held

    step_with(optimizer, [torch.zeros(3)])
    assert n() == 0, "torch.distributed.checkpoint makes state by such a step"
    optimizer.param_groups[0]["lr"] = 0.1
    step_with(optimizer, [torch.zeros(3)])
    assert n() == 1, "without evidence it counts"
    optimizer.param_groups[0]["lr"] = 0.0
    step_with(optimizer, [torch.ones(3)])
    assert n() == 2
    optimizer.load_state_dict(optimizer.state_dict())
    step_with(optimizer, [torch.ones(3)])
    assert n() == 3
