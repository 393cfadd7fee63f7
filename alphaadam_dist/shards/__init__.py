"""What an optimizer parameter holds of the model, one file per kind of sharding.

A **shard** is a run of elements of one model parameter inside the flattened local storage of an optimizer parameter.
A plain tensor or a DTensor holds one; a flat partition, as ZeRO and FSDP1 make them, holds many and may end in
padding, which belongs to no shard. Two ranks hold the same elements of a model parameter exactly when ``key`` and
``part`` are equal: that is all that layout.py needs to count every element once.
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


_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
"""What FSDP1, activation checkpointing and torch.compile call the module that they wrap."""


def clean_name(name: str) -> str:
    """A parameter's name without the parts that wrappers of modules put into it; DDP's is left to ``clean_names``."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """For the names of all parameters of a model the model's own, the same under every wrapper and never two alike.

    DDP calls what it wraps "module", as a model may call a part of itself. So "module." goes only where every name
    begins with it, as often as that is so, which makes no two names equal. Where two would be equal without what
    wrappers put into them, all stay as they are.
    """
    whole = list(dict.fromkeys(names))
    cleaned = [clean_name(name) for name in whole]
    while cleaned and all(name.startswith("module.") for name in cleaned):
        cleaned = [name.removeprefix("module.") for name in cleaned]
    return dict(zip(whole, cleaned if len(set(cleaned)) == len(whole) else whole, strict=True))


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
