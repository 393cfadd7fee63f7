"""What an optimizer parameter holds of the model, one file per kind of sharding.

The words of this library, which all of it uses:

flat: an optimizer parameter that a backend made of many model parameters, as ZeRO and FSDP1 do.
shard: consecutive elements of one model parameter in the flattened local tensor of an optimizer parameter. A plain
    tensor or a DTensor holds one, a flat holds many.
positions: where a shard's elements stand in the flattened model parameter.
padding: elements of a flat that are of no shard.
segment: what a kernel takes at a time: a shard, padding, or a whole flat where nothing in it must be told apart.
owner: of the ranks that hold a shard the one that counts it.
replica: a shard that another rank holds too.
layout: where all segments are, which this rank owns, and the ranks that reduce together.

Two ranks hold the same elements of a model parameter exactly when ``key`` and ``place`` of their shards are equal.
That is all that layout.py needs to count every element once.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ..rounding import Positions

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Consecutive elements of one model parameter.

    Attributes:
        key: which parameter of the model; equal names of different parameters must differ here.
        place: which elements of it; equal on two ranks exactly when they hold the same elements.
        start: first element in the optimizer parameter's flattened local tensor.
        numel: number of elements.
        global_numel: number of elements of the whole model parameter, None where no rank knows it.
        positions: of the elements in the flattened model parameter, None where no rank knows them.
        counted: it takes part in the agreement on who counts what. Of copies that are cut in several ways one does.
    """

    key: str
    place: Hashable
    start: int
    numel: int
    global_numel: int | None
    positions: Positions | None = field(default=None, kw_only=True)
    counted: bool = field(default=True, kw_only=True)

    @property
    def replicated(self) -> bool:
        """Every rank holds the whole parameter."""
        return self.place == ()


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


def cut(tensors: Sequence[Tensor], segments: Iterable[tuple[int, int, T]]) -> Iterator[tuple[T, int, Tensor]]:
    """Cut a flat tensor, given as tensors that concatenate to it: (label, start, 1-D view) of every overlap, in order.

    Each tensor is read flattened and must be contiguous where it has more than one dimension. ``segments`` are (start,
    numel, label), ascending and disjoint. Elements of no segment are left out.
    """
    position, rest = 0, iter(tensors)
    tensor = next(rest, None)
    for start, numel, label in segments:
        end = start + numel
        while tensor is not None and start < end:
            if position + tensor.numel() <= start:
                position += tensor.numel()
                tensor = next(rest, None)
                continue
            stop = min(end, position + tensor.numel())
            yield label, start, tensor.reshape(-1)[start - position : stop - position]
            start = stop
