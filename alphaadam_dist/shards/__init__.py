"""What an optimizer parameter holds of the model, one file per kind of sharding.

A **shard** is a run of elements of one model parameter inside the flattened local storage of an optimizer parameter.
A plain tensor or a DTensor holds one; a flat partition, as ZeRO and FSDP1 make them, holds many and may end in
padding, which belongs to no shard. Two ranks hold the same elements of a model parameter exactly when ``key`` and
``part`` are equal: that is all that ownership.py needs to count every element once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A run of elements of one model parameter.

    Attributes:
        key: which parameter of the model; equal names of different parameters must differ here.
        part: which part of it; equal on two ranks exactly when they hold the same elements.
        start: first element in the optimizer parameter's flattened local tensor.
        numel: number of elements.
        global_numel: number of elements of the whole model parameter, None where no rank knows it.
    """

    key: str
    part: Hashable
    start: int
    numel: int
    global_numel: int | None

    @property
    def replicated(self) -> bool:
        """Every rank holds the whole parameter."""
        return self.part == ()


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers put into it, so that it is the same under every wrapper."""
    for prefix in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(prefix, "")
    return name.removeprefix("module.")


def cut(pieces: Sequence[Tensor], runs: Iterable[tuple[int, int, T]]) -> Iterator[tuple[T, int, Tensor]]:
    """Cut a flat tensor given in pieces along runs: (label, start, 1-D view) for every overlap, in order.

    ``pieces`` concatenate to the flat (each is read flattened and must be contiguous where it has more than one
    dimension); ``runs`` are (start, numel, label), ascending and disjoint. Elements of no run are left out.
    """
    position, rest = 0, iter(pieces)
    piece = next(rest, None)
    for start, numel, label in runs:
        end = start + numel
        while piece is not None and start < end:
            if position + piece.numel() <= start:
                position += piece.numel()
                piece = next(rest, None)
                continue
            stop = min(end, position + piece.numel())
            yield label, start, piece.reshape(-1)[start - position : stop - position]
            start = stop
