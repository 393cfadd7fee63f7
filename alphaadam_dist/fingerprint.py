"""A number for the bits of a tensor, by which ranks compare what they hold without sending it.

Each word of 8 bytes is multiplied by a weight of its place, in 64 bits with overflow, and the products are added: one
read, on the device, exact, so a CPU and a GPU find the same number. Rows of words are summed first, then those sums in
the same way, so that little memory is needed beside the tensor.
"""

import functools
import hashlib
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

ROW = 2**14  # words
ROWS = 64  # at a time: 8 MiB of products
BUCKETS = 256
UNKNOWN = -(2**63)
"""The fingerprint of what cannot be read: a tensor on meta, on disk, without elements, or none at all."""


def fingerprints(tensors: Sequence[Tensor | None]) -> list[int]:
    """Of each tensor its number, less than 2^62 in size, or UNKNOWN. Waits for each device once.

    Equal numbers mean equal dtype, length and bits in the same order, whatever the shape.
    """
    numbers = [UNKNOWN] * len(tensors)
    by_device: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)
    for i, tensor in enumerate(tensors):
        if tensor is not None and _readable(tensor):
            by_device[tensor.device][i] = _digest(tensor)
    for digests in by_device.values():
        for i, digest in zip(digests, torch.stack(list(digests.values())).tolist(), strict=True):
            tensor = tensors[i]
            assert tensor is not None
            numbers[i] = joined((digest, str(tensor.dtype), tensor.numel()))
    return numbers


def joined(values: object) -> int:
    """One number of this kind for numbers and strings in tuples."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little", signed=True) >> 1


def varies(tensor: Tensor | None) -> bool:
    """It has two different elements, so its fingerprint tells it from others. Synchronises."""
    if tensor is None or not _readable(tensor):
        return False
    low, high = torch.aminmax(tensor.detach())
    return bool(low != high)


def sketch(tensor: Tensor | None) -> Tensor | None:
    """Float64 (BUCKETS,) on the CPU whose differences have about the L2 norms of the tensors' own, to 10 %.

    Elements are added into buckets with random signs. None where the tensor cannot be read.
    """
    if tensor is None or not _readable(tensor):
        return None
    weights = _weights(tensor.device)
    sums = torch.zeros(BUCKETS, dtype=torch.float64, device=tensor.device)
    for i, chunk in enumerate(tensor.detach().contiguous().view(-1).split(ROW * ROWS)):
        rows = torch.nn.functional.pad(chunk.double(), (0, -len(chunk) % ROW)).view(-1, ROW)
        signs = (weights.roll(i * ROWS)[: len(rows), None] * weights >> 37) & 1
        sums += torch.where(signs == 1, rows, -rows).sum(0).view(-1, BUCKETS).sum(0)
    return sums.cpu()


def _readable(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    return tensor.data_ptr() != 0


def _digest(tensor: Tensor) -> Tensor:
    """0-dim int64 on the tensor's device."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    weights = _weights(tensor.device)
    sums = torch.cat([_row_sums(_words(chunk), weights) for chunk in data.split(8 * ROW * ROWS)])
    while len(sums) > 1:
        # not linear, or swapping a row with a column would not be seen
        sums = _row_sums((sums ^ (sums >> 29)) * -7046029254386353131, weights)
    return sums[0]


def _words(data: Tensor) -> Tensor:
    """Bytes as int64, with zeros behind the last."""
    if len(data) % 8:
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


def _row_sums(words: Tensor, weights: Tensor) -> Tensor:
    whole = len(words) // ROW
    sums = (words[: whole * ROW].view(whole, ROW) * weights).sum(1)
    rest = words[whole * ROW :]
    return torch.cat((sums, (rest * weights[: len(rest)]).sum(0, keepdim=True))) if len(rest) else sums


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd int64 (ROW,): the same everywhere."""
    random = torch.Generator("cpu").manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (ROW,), generator=random, device="cpu") | 1).to(device)
