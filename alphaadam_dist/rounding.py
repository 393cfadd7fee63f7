"""Stochastic rounding to bf16 whose random bits depend on what an element is, never on which rank holds it.

Rounding to nearest loses every change that is smaller than half a unit in the last place: with beta2 = 0.999 a second
moment stands still. Stochastic rounding takes one of the two neighbours, the nearer one more often, so that the mean
is the value itself. A local generator would give every sharding other bits. Here a counter-based generator,
Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11), makes them from

    the key        64 bits, of the seed and of the parameter's name in the model
    the counter    which elements of the parameter, n, and which tensor: 0 the parameter, 1 its first moment, 2 second

and one call gives 16 bits to each of 8 elements. The format is fixed in docs/algorithm.md, with golden values. This
file is the definition, in plain torch operations; the kernels have the same bits.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT = 1
"""Of the random bits. Checkpoints name it."""
INITIAL_ROUNDING = [FORMAT, 0]  # alphaadam_rounding = [format, n] before the first step
SEEDS = 2**64
STATE_DTYPES = {"bfloat16": torch.bfloat16}
PARAMETER_DTYPES = (torch.float32, torch.bfloat16)
"""Of the parameters whose state may be rounded."""

SLICE = 2**16
"""Elements whose bits are made at a time, so that the 64-bit integers in between need little memory."""
_BLOCK, _LANES, _COLUMNS = 128, 8, 16  # elements that share 16 calls: element 16 l + c takes lane l of call c
_WORD = 2**32 - 1
_LARGEST, _INFINITE, _NAN = 0x7F7FFFFF, 0x7F800000, 0x7FC00000


@dataclass(frozen=True)
class Positions:
    """Where the elements of a shard stand in the flattened model parameter: rows of consecutive elements.

    Element j of the shard is element ``start + j // inner * stride + j % inner`` of the parameter.
    """

    start: int
    inner: int
    stride: int

    def pieces(self, numel: int, most: int) -> Iterator[tuple[int, int, "Positions"]]:
        """(first element, number of elements, their positions) of a shard's pieces of about ``most`` elements."""
        rows = max(1, most // self.inner)
        for row in range(0, -(-numel // self.inner), rows):
            begin, end = row * self.inner, min((row + rows) * self.inner, numel)
            at = self.start + row * self.stride
            if rows > 1:
                yield begin, end - begin, Positions(at, self.inner, self.stride)
                continue
            for first in range(begin, end, most):
                count = min(most, end - first)
                yield first, count, consecutive(at + first - begin, count)


def consecutive(start: int, numel: int) -> Positions:
    """Positions of ``numel`` elements that follow each other."""
    return Positions(start, max(numel, 1), max(numel, 1))


@dataclass(frozen=True)
class Rounding:
    """How each tensor of a list is rounded in one step.

    Attributes:
        n: the number of steps applied to the whole model, this one counted.
        keys: of :func:`key_of`, one a tensor.
        positions: of each tensor's elements.
    """

    n: int
    keys: Sequence[int]
    positions: Sequence[Positions]

    def numbers(self) -> list[int]:
        """As kernels take it: n, then of each tensor its key as a signed number, start, inner and stride."""
        each = zip(self.keys, self.positions, strict=True)
        return [self.n, *(x for key, at in each for x in (_signed(key), at.start, at.inner, at.stride))]

    def of(self, part: Sequence[int]) -> "Rounding":
        """How the tensors at these places are rounded."""
        return Rounding(self.n, [self.keys[i] for i in part], [self.positions[i] for i in part])


def _signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


def key_of(seed: int, name: str) -> int:
    """The key of a model parameter's bits: BLAKE2b with 8 bytes of the seed in 8 bytes and the name in UTF-8."""
    text = seed.to_bytes(8, "little") + name.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def philox(counter: Sequence[Tensor | int], key: int) -> list[Tensor]:
    """Philox4x32-10: four words of 32 random bits for each counter of four words, int64 tensors of one shape."""
    words = [word if isinstance(word, Tensor) else torch.tensor(word, device="cpu") for word in counter]
    low, high = key & _WORD, key >> 32
    for _ in range(10):
        # a product of 64 bits wraps around as int64, and has the right bits
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (second >> 32 & _WORD) ^ words[1] ^ low,
            second & _WORD,
            (first >> 32 & _WORD) ^ words[3] ^ high,
            first & _WORD,
        ]
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return words


def random_bits(
    key: int, positions: Positions, numel: int, *, n: int, tensor: int, device: torch.device | None = None
) -> Tensor:
    """16 random bits for each of ``numel`` elements of a shard: int64 (numel,), 0 to 65535.

    Args:
        n, key: as in :class:`Rounding`.
        tensor: 0 the parameter, 1 its first moment, 2 its second.
        device: of the result; None: the CPU.
    """
    whole = [torch.zeros(0, dtype=torch.int64, device=device or "cpu")]
    for _, count, piece in positions.pieces(numel, SLICE):
        rows = -(-count // piece.inner)
        first = piece.start + piece.stride * torch.arange(rows, device=device or "cpu")[:, None]
        blocks = (piece.inner + 2 * (_BLOCK - 1)) // _BLOCK  # that a row may touch
        block = first // _BLOCK + torch.arange(blocks, device=first.device)
        call = block[:, :, None] * _COLUMNS + torch.arange(_COLUMNS, device=first.device)
        words = philox([call & _WORD, call >> 32, n, tensor], key)
        lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=2)
        place = first % _BLOCK + torch.arange(piece.inner, device=first.device)
        whole.append(lanes.view(rows, -1).gather(1, place).view(-1)[:count])
    return torch.cat(whole)


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 values rounded to bf16 by 16 random bits each, of the same shape or flattened.

    The bits are added below the last place that bf16 has, and the rest is cut off: a value that bf16 holds stays as it
    is, signs stay. Finite values stay finite: beyond bf16's largest number they become that. Every NaN is 0x7FC0.
    """
    as_int = values.view(torch.int32)
    magnitude = as_int & 0x7FFFFFFF
    finite = (magnitude + bits.to(torch.int32).view(values.shape)).clamp(max=_LARGEST)
    kept = torch.where(magnitude < _INFINITE, finite, magnitude) | (as_int & -0x80000000)
    kept = torch.where(magnitude > _INFINITE, _NAN, kept)
    return (kept >> 16).to(torch.int16).view(torch.bfloat16)


def round_into_(into: Tensor, values: Tensor, rounding: Rounding, at: int, tensor: int) -> None:
    """Round fp32 values into a bf16 tensor, that of place ``at`` in the list. Mutates ``into``."""
    bits = random_bits(
        rounding.keys[at], rounding.positions[at], values.numel(), n=rounding.n, tensor=tensor, device=values.device
    )
    into.copy_(rounded(values.contiguous(), bits))
