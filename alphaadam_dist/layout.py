"""Which rank counts which shard, so that every element of the model counts exactly once.

The owner of a shard is the lowest rank of the reduce group that holds its (key, place). Other simple rules are wrong:
"coordinate 0 on every replicated mesh dimension" counts twice when a parameter lives on a submesh, and weighting by
1/replicas makes the sums inexact. Ranks exchange one table of (key hash, place hash, numel), 24 bytes a shard, once per
layout, a few MiB at a time; each proves that the owned elements of its parameters add up to the whole of them. That
ranks which claim one part hold copies of it is proved in replicas.py.
"""

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_

import torch
import torch.distributed as dist
from torch import Tensor

from . import rank_failures
from .handshake import stop_together
from .rounding import Positions, key_of
from .shards import Shard
from .torch_versions import all_gather_single

SLICE_BYTES = 2**20  # of the exchange, in memory at a time
EXCHANGE = "handshake (exchange of who holds which shard)"
NOWHERE = Positions(0, 2**62, 2**62)  # of padding, whose random bits are of no element


@dataclass(frozen=True, eq=False)
class Segment:
    """What a kernel takes of an optimizer parameter at a time: a shard, or the padding between shards.

    ``row`` is its row of the statistics buffer. ``owned`` is whether this rank counts it. ``late`` is how many updates
    it is behind its optimizer parameter. ``key`` is of the model parameter and ``positions`` of the elements in it,
    neither of padding.
    """

    start: int
    numel: int
    row: int
    owned: bool
    whole: bool  # it is the optimizer parameter's whole local tensor, which then needs no cutting
    late: int = 0
    key: str = ""
    positions: Positions = NOWHERE


@dataclass(frozen=True, eq=False)
class HeldShard(Shard):
    """A shard of this rank's, and which optimizer parameter holds it.

    ``replica_id`` is its number among the shards of the whole model that several ranks hold, and ``holders`` the number
    of the set of ranks that hold it; -1 where no other rank does.
    """

    param: Tensor
    owned: bool
    replica_id: int
    holders: int


@dataclass(frozen=True, eq=False)
class Cut:
    """Parameters of one list, cut into segments.

    ``of`` says which in ``params`` each is of; all may be ``whole``, and all may be ``owned``.
    """

    params: tuple[Tensor, ...]
    segments: tuple[Segment, ...]
    of: tuple[int, ...]
    whole: bool
    owned: bool


@dataclass
class Layout:
    """Where every element counts.

    Attributes:
        params: the optimizer parameters this was built for, in order.
        segments: for each of them its segments, ascending.
        keys: the model parameters that this rank knows, by row (layer scope; empty for global).
        rows: rows of the statistics buffer: 1 for global scope, one per model parameter for layer scope.
        numel: elements of the whole model.
        group: the process group to all-reduce over; None where every rank holds everything and nothing is reduced.
        device: where the statistics live.
        shards: this rank's.
        replicas: how many shards of the whole model several ranks hold.
        holder_sets: how many different sets of ranks hold them.
        reference: all ranks take the reference kernels, because one of them cannot have the fast ones.
        drift_told: that replicas differ was said already.
        places: what the parameters were when this was built, for the builder to compare.
        left_out: frozen parameters of the optimizer that could not be stepped; they are counted nowhere.
    """

    params: tuple[Tensor, ...]
    segments: dict[Tensor, tuple[Segment, ...]]
    keys: dict[int, str]
    rows: int
    numel: int
    group: dist.ProcessGroup | None
    device: torch.device
    shards: tuple[HeldShard, ...] = ()
    replicas: int = 0
    holder_sets: int = 0
    reference: bool = False
    drift_told: bool = False
    places: object = None
    left_out: tuple[Tensor, ...] = ()
    # kept answers; dataclasses.replace leaves them behind, because another layout's are others
    _indices: dict[tuple[Segment, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _keys_of_bits: dict[tuple[str, int], int] = field(default_factory=dict, init=False, repr=False)
    _cuts: dict[Tensor, Cut] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def several_devices(self) -> bool:
        """This rank's parameters lie on more than one device."""
        return len({param.device for param in self.params}) > 1

    def cut_of(self, params: Sequence[Tensor]) -> Cut:
        """How these parameters, one or more, are cut. Kept under the first of them: most steps ask for the same."""
        held = self._cuts.get(params[0])
        if held is None or len(held.params) != len(params) or not all(map(is_, held.params, params)):
            pairs = [(segment, i) for i, param in enumerate(params) for segment in self.segments[param]]
            segments = tuple(segment for segment, _ in pairs)
            whole = len(segments) == len(params) and all(segment.whole for segment in segments)
            owned = all(segment.owned for segment in segments)
            held = self._cuts[params[0]] = Cut(tuple(params), segments, tuple(i for _, i in pairs), whole, owned)
        return held

    def indices(self, segments: tuple[Segment, ...]) -> tuple[Tensor, Tensor]:
        """The row (int64) and whether this rank owns it (float64, 0 or 1) of n segments, each (n,) on the device."""
        if segments not in self._indices:
            # a model whose unused parameters change from step to step; in a backward each has an entry of its own
            if len(self._indices) >= max(256, 2 * len(self.segments)):
                self._indices.clear()
            rows = torch.tensor([s.row for s in segments], dtype=torch.int64, device=self.device)
            owned = torch.tensor([s.owned for s in segments], dtype=torch.float64, device=self.device)
            self._indices[segments] = rows, owned
        return self._indices[segments]

    def keys_of_bits(self, segments: tuple[Segment, ...], seed: int) -> list[int]:
        """The key of the random bits of each segment's parameter."""
        held = self._keys_of_bits
        for segment in segments:
            if (segment.key, seed) not in held:
                held[segment.key, seed] = key_of(seed, segment.key)
        return [held[segment.key, seed] for segment in segments]


def _hash(value: Hashable) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def _exchange(table: Tensor, group: dist.ProcessGroup, device: torch.device) -> Iterator[Tensor]:
    """All ranks' rows of an int64 table (n, 3), a slice of the keys at a time: (world, height, 3) on the CPU.

    A slice has every row of its keys, so each can be judged by itself, and thousands of ranks need little memory.
    Where a rank has fewer rows than ``height`` the rest have numel -1.
    """
    world = dist.get_world_size(group)
    longest = torch.tensor(len(table), device=device)
    with rank_failures.explaining(EXCHANGE, group):
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    count = max(1, math.ceil(world * int(longest) * table.shape[1] * table.itemsize / SLICE_BYTES))
    slice_of = table[:, 0].remainder(count)
    heights = torch.bincount(slice_of, minlength=count).to(device)
    with rank_failures.explaining(EXCHANGE, group):
        dist.all_reduce(heights, op=dist.ReduceOp.MAX, group=group)
    for i, height in enumerate(heights.tolist()):
        if height == 0:
            continue
        mine = table[slice_of == i]
        padded = torch.nn.functional.pad(mine, (0, 0, 0, height - len(mine)), value=-1).to(device)
        gathered = torch.empty((world * height, table.shape[1]), dtype=torch.int64, device=device)
        with rank_failures.explaining(EXCHANGE, group):
            all_gather_single(gathered, padded, group=group)
        yield gathered.view(world, height, -1).cpu()


@functools.cache
def _hashes_of_ranks(world: int) -> Tensor:
    """int64 (world,). Sums of them name sets of ranks."""
    return torch.tensor([_hash(rank) for rank in range(world)], device="cpu")


def _holders(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of every distinct shard in a slice of the exchange: key, place, numel, its lowest rank, how many ranks, which.

    int64 (shards,) each, ascending in place.
    """
    flat = gathered.view(-1, gathered.shape[2])
    present = (flat[:, 2] >= 0).nonzero().squeeze(1)
    order = present[torch.argsort(flat[present, 1], stable=True)]  # by place, then rank
    place = flat[order, 1]
    first = torch.ones(len(order), dtype=torch.bool, device="cpu")
    first[1:] = place[1:] != place[:-1]
    holders = order[first]
    counts = first.nonzero().squeeze(1).diff(append=torch.tensor([len(order)], device="cpu"))
    of_rank = _hashes_of_ranks(gathered.shape[0])[order // gathered.shape[1]]
    sets = torch.zeros_like(counts).index_add_(0, first.cumsum(0) - 1, of_rank)
    return flat[holders, 0], place[first], flat[holders, 2], holders // gathered.shape[1], counts, sets


@dataclass
class _Agreed:
    """What the exchange told.

    Attributes:
        owned: hashes of the shards that this rank owns.
        numels: elements of each key of the whole model, by the key's hash.
        replica_ids: of this rank's shards that others hold too, by the shard's hash.
        replicas: how many shards of the whole model several ranks hold.
        holders: the set of ranks that holds each of this rank's shards that others hold too, by the shard's hash.
        sets: all sets of ranks that hold shards together.
    """

    owned: set[int] = field(default_factory=set)
    numels: Counter[int] = field(default_factory=Counter)
    replica_ids: dict[int, int] = field(default_factory=dict)
    replicas: int = 0
    holders: dict[int, int] = field(default_factory=dict)
    sets: set[int] = field(default_factory=set)


def _agree(hashed: Sequence[tuple[int, int, int]], group: dist.ProcessGroup | None, device: torch.device) -> _Agreed:
    """Exchange (key, place, numel) of this rank's shards. Collective; without a group all is this rank's own."""
    agreed = _Agreed()
    if group is None:
        agreed.owned.update(shard for _, shard, _ in hashed)
        for key, _, numel in hashed:
            agreed.numels[key] += numel
        return agreed
    rank, table = dist.get_rank(group), torch.tensor(hashed, dtype=torch.int64, device="cpu").reshape(-1, 3)
    for gathered in _exchange(table, group, device):
        keys, shards, numels, owners, counts, sets = _holders(gathered)
        agreed.owned.update(shards[owners == rank].tolist())
        distinct, of_row = keys.unique(return_inverse=True)
        of_key = torch.zeros_like(distinct).index_add_(0, of_row, numels)
        agreed.numels.update(dict(zip(distinct.tolist(), of_key.tolist(), strict=True)))
        several = (counts > 1) & (numels > 0)
        replicas, sets = shards[several], sets[several]
        mine = torch.isin(replicas, table[:, 1]).nonzero().squeeze(1)
        agreed.sets.update(sets.unique().tolist())
        agreed.holders.update(zip(replicas[mine].tolist(), sets[mine].tolist(), strict=True))
        agreed.replica_ids.update(zip(replicas[mine].tolist(), (agreed.replicas + mine).tolist(), strict=True))
        agreed.replicas += len(replicas)
    return agreed


def _prove_coverage(shards: Sequence[Shard], held: Mapping[str, int], world: int) -> str | None:
    """What is wrong with this rank's parameters, or None. ``held`` is how many elements of each key are owned."""
    keys = Counter(shard.key for shard in shards)
    twice = next((key for key, count in keys.items() if count > 1), None)
    if twice is not None:
        return f"two parameters are named {twice!r}: every parameter needs a name of its own"
    for shard in shards:
        if shard.global_numel is not None and held[shard.key] != shard.global_numel:
            return (
                f"parameter {shard.key!r} has {shard.global_numel} elements, but the shards on the {world} ranks of "
                f"the reduce group hold {held[shard.key]} different ones (here: place {shard.place}, "
                f"{shard.numel} elements). Give the optimizer the process_group over which this model is sharded, "
                "names that are unique in the whole model where ranks hold different parameters of one name, or "
                "sharding='replicated' / 'sharded' where plain tensors were misjudged"
            )
    return None


def build_layout(
    params: Sequence[Tensor],
    shards: Sequence[Sequence[Shard]],
    numels: Sequence[int],
    *,
    scope: str,
    group: dist.ProcessGroup | None,
    device: torch.device,
    merge: bool = False,
    names: Iterable[str] = (),
) -> Layout:
    """Decide who counts what. Collective over ``group`` where one is given; else everything is this rank's own.

    Args:
        params: optimizer parameters.
        shards: for each its shards, ascending in ``start``.
        numels: for each the number of its local elements, padding included.
        device: of the statistics buffer and of the exchange.
        merge: under global scope make each parameter one segment where this rank owns all its shards. Right where
            padding never carries a gradient.
        names: keys that this rank can name beside those of its own shards.

    Raises:
        ValueError: two parameters have one key, or some element of the model would not count exactly once.
    """
    pairs = [(param, shard) for param, held in zip(params, shards, strict=True) for shard in held]
    flat = [shard for _, shard in pairs]
    hash_of = {key: _hash(key) for key in {*names, *(s.key for s in flat)}}
    hashed = [(hash_of[s.key], _hash((s.key, s.place)), s.numel) for s in flat]
    agreed = _agree([row for row, s in zip(hashed, flat, strict=True) if s.counted], group, device)
    held_of = {key: agreed.numels[hash] for key, hash in hash_of.items()}
    problem = _prove_coverage(flat, held_of, 1 if group is None else dist.get_world_size(group))
    stop_together(problem, group, device, "does every element count once?")
    number_of = {-1: -1, **{name: number for number, name in enumerate(sorted(agreed.sets))}}
    held_shards = tuple(
        HeldShard(s.key, s.place, s.start, s.numel, s.global_numel, param, s.counted and hash in agreed.owned,
                  agreed.replica_ids.get(hash, -1), number_of[agreed.holders.get(hash, -1)], positions=s.positions,
                  counted=s.counted)
        for (param, s), (_, hash, _) in zip(pairs, hashed, strict=True)
    )  # fmt: skip
    row_of = {key: row for row, key in enumerate(sorted(agreed.numels))} if scope == "layer" else {}
    segments: dict[Tensor, tuple[Segment, ...]] = {}
    owns = iter([shard.owned for shard in held_shards])
    for param, held, whole in zip(params, shards, numels, strict=True):
        own = [
            Segment(s.start, s.numel, row_of.get(hash_of[s.key], 0), next(owns), whole=s.numel == whole,
                    key=s.key, positions=s.positions or NOWHERE)
            for s in held
        ]  # fmt: skip
        if merge and scope == "global" and all(segment.owned for segment in own):
            own = [Segment(0, whole, 0, owned=True, whole=True)]
        segments[param] = tuple(_with_padding(own, whole))
    keys = {row_of[hash]: key for key, hash in hash_of.items() if hash in row_of}
    rows, numel = max(len(row_of), 1), agreed.numels.total()
    return Layout(
        tuple(params), segments, keys, rows, numel, group, device, held_shards, agreed.replicas, len(agreed.sets)
    )


def _with_padding(segments: Sequence[Segment], numel: int) -> Iterator[Segment]:
    """Fill the gaps between segments with padding, which nobody owns and all update."""
    position = 0
    for segment in segments:
        if segment.start > position:
            yield Segment(position, segment.start - position, segment.row, owned=False, whole=False)
        yield segment
        position = segment.start + segment.numel
    if position < numel:
        row = segments[-1].row if segments else 0
        yield Segment(position, numel - position, row, owned=False, whole=position == 0)


def statistics_device(params: Sequence[Tensor], group: dist.ProcessGroup | None) -> torch.device:
    """Where the parameters are, unless the group cannot reduce there (NCCL with parameters offloaded to the CPU).

    Of several devices the first accelerator: counts go there from the CPU without waiting.
    """
    devices = {param.device: None for param in params} or {torch.device("cpu"): None}
    device = min(devices, key=lambda device: (device.type == "meta", device.type == "cpu"))
    if group is not None and device.type not in dist.get_backend_config(group):
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return device
