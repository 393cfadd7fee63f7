"""Fingerprints: equal for equal bits and for nothing else, whatever the shape, the place in memory or the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alphaadam_dist.fingerprint import ROW, ROWS, UNKNOWN, fingerprints, sketch, varies

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (1, 2, 3, 7, ROW - 1, ROW, 2 * ROW, 2 * ROW + 3)
SEVERAL_PIECES = (2 * ROW * ROWS, 2 * ROW * ROWS + 5)


def of(tensor: Tensor | None) -> int:
    return fingerprints([tensor])[0]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [(n, dtype) for n in LENGTHS for dtype in DTYPES] + [(n, torch.float32) for n in SEVERAL_PIECES],
)
def test_equal_bits_have_one_number_and_one_changed_bit_another(length: int, dtype: torch.dtype) -> None:
    tensor = random(length, dtype=dtype)
    number = of(tensor)
    assert number == of(tensor.clone())
    assert abs(number) < 2**62
    chance = torch.Generator().manual_seed(1)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for at in {0, length - 1, *torch.randint(0, length, (3,), generator=chance).tolist()}:
        for bit in (0, 8 * dtype.itemsize - 2, 8 * dtype.itemsize - 1):
            changed = tensor.clone()
            changed.view(bits)[at] ^= torch.tensor(1, dtype=bits) << bit
            assert of(changed) != number, (at, bit)


def test_order_counts_also_across_rows() -> None:
    tensor = random(2 * ROW * 3)
    words = tensor.view(-1, 2)
    for one, other in ((0, 1), (1, ROW), (5, 2 * ROW + 3), (ROW + 2, 2 * ROW + 1)):
        swapped = words.clone()
        swapped[[one, other]] = words[[other, one]]
        assert of(swapped.view(-1)) != of(tensor)
    rows = tensor.view(3, -1)
    assert of(rows.flip(0)) != of(tensor)


def test_zeros_of_other_lengths_signs_and_dtypes_differ() -> None:
    zeros = torch.zeros(8)
    other = [torch.zeros(9), -zeros, zeros.double()[:4], zeros.bfloat16().repeat(2), torch.zeros(1)]
    assert len({of(tensor) for tensor in (zeros, *other)}) == 6


def test_the_place_in_memory_and_the_shape_do_not_count() -> None:
    flat = random(1000)
    for offset in range(4):
        assert of(torch.cat((torch.zeros(offset), flat))[offset:]) == of(flat)
    assert of(flat.view(10, 100)) == of(flat)
    assert of(flat.view(10, 100).t().contiguous().t()) == of(flat)
    assert of(flat.repeat_interleave(2)[::2]) == of(flat)
    odd = torch.cat((torch.zeros(1), random(ROW * 2 * ROWS + 9, seed=3)))[1:]
    assert of(odd) == of(odd.clone())


@pytest.mark.parametrize("tensor", [None, torch.zeros(0), torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()])
def test_what_cannot_be_read_is_unknown(tensor: Any) -> None:
    assert of(tensor) == UNKNOWN
    assert sketch(tensor) is None
    assert not varies(tensor)


def test_freed_storage_is_unknown() -> None:
    """As FSDP frees what it will gather again."""
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    assert of(tensor) == UNKNOWN


def test_a_default_device_changes_nothing() -> None:
    expected = of(random(100))
    with torch.device("meta"):
        assert of(torch.randn(100, generator=torch.Generator().manual_seed(0), device="cpu")) == expected


def test_many_at_once_are_those_one_by_one() -> None:
    tensors = [random(5), None, random(7, seed=1), torch.zeros(0), random(3, dtype=torch.float64)]
    assert fingerprints(tensors) == [of(tensor) for tensor in tensors]
    assert fingerprints([]) == []


@pytest.mark.slow
def test_it_needs_little_memory_beside_the_tensor() -> None:
    """Of 128 MiB a sixteenth, and not a copy."""
    tensor = torch.ones(2**25)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        of(tensor)
    largest = max(event.self_cpu_memory_usage / max(event.count, 1) for event in profile.key_averages())
    assert 0 < largest < tensor.nbytes / 15


@pytest.mark.parametrize(("values", "told"), [([1, 1, 1], False), ([0, 0], False), ([2], False), ([1, 2], True)])
def test_varies(values: list[float], told: bool) -> None:
    assert varies(torch.tensor(values, dtype=torch.float32)) == told


# ---- sketches


def deviation(a: Tensor, b: Tensor) -> float:
    one, other = sketch(a), sketch(b)
    assert one is not None
    assert other is not None
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("length", [1000, 3 * ROW, 2 * ROW * ROWS + 17])
@pytest.mark.parametrize("kind", ["noise", "constant", "one element", "few"])
def test_sketches_are_as_far_apart_as_the_tensors(length: int, kind: str) -> None:
    tensor, change = random(length), torch.zeros(length)
    if kind == "noise":
        change = 0.01 * random(length, seed=1)
    elif kind == "constant":
        change += 0.01
    elif kind == "one element":
        change[length // 3] = 7.0
    else:
        change[:: length // 9] = random(len(change[:: length // 9]), seed=2)
    assert deviation(tensor, tensor + change) == pytest.approx(float(change.norm() / tensor.norm()), rel=0.2)
    assert deviation(tensor, tensor.clone()) == 0


def test_sketches_of_unrelated_tensors_are_far_apart() -> None:
    assert deviation(random(10_000), random(10_000, seed=1)) == pytest.approx(2**0.5, rel=0.2)
