"""Are the rank files of a DeepSpeed checkpoint those of these ranks, of one run and one step?

DeepSpeed gives each rank the file with its number and looks no further: two files that changed places, or one of
another run, load without a word. So each file says which part of the model it is of, in the parameter groups under
``PARTITION``, and all of one checkpoint hold the same ``alphaadam_state``. Files without either, AdamW's or older ones,
are taken as they are.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from .. import rank_failures
from ..optimizer import AlphaOptimizer
from ..shards import Shard
from .unused import check_missed

PARTITION = "alphaadam_partition"
"""Key of parameter groups: [rank, number of ranks, hash of the parameters' names, hash of how they are divided]."""


def optimizer_states(saved: Any) -> Iterator[dict[str, Any]]:
    """The optimizer's own state_dicts inside what a wrapper's ``load_state_dict`` is given."""
    for state in saved if isinstance(saved, list) else [saved]:
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            held = state.get(key) if isinstance(state, dict) else None
            if isinstance(held, dict) and "param_groups" in held:
                yield held


class RankFiles:
    """What this rank's file of a checkpoint says, and the check of one that is to be loaded."""

    def __init__(
        self,
        optimizer: AlphaOptimizer,
        group: dist.ProcessGroup,
        shards: Sequence[Sequence[Shard]],
        names: Iterable[str],
    ) -> None:
        """``group``: of the ranks that hold the model. ``names``: of all parameters."""
        divided = [[(shard.key, shard.place, shard.start, shard.numel) for shard in held] for held in shards]
        self._optimizer, self._group = optimizer, group
        self._mine = [dist.get_rank(group), dist.get_world_size(group), _hash(sorted(names)), _hash(divided)]
        self.mark()

    def mark(self) -> None:
        """Write it into the optimizer's parameter groups."""
        for group in self._optimizer.param_groups:
            group[PARTITION] = self._mine

    def check(self, saved: Sequence[dict[str, Any]], *, alone: bool) -> None:
        """Raise ValueError on every rank where one has a file that does not fit, or is not its own.

        Args:
            saved: the optimizer's states in this rank's file.
            alone: the ranks load one after another and must not wait for each other; else this is collective.
        """
        problem = self._problem(saved)
        if not alone:
            groups = [group for state in saved for group in state["param_groups"]]
            state = next((list(group["alphaadam_state"]) for group in groups if "alphaadam_state" in group), None)
            told: list[Any] = [None] * dist.get_world_size(self._group)
            try:
                dist.all_gather_object(told, (problem, state), group=self._group)
            except RuntimeError as error:
                raise rank_failures.explained(error, "comparison of a checkpoint's rank files", self._group) from error
            problem = problem or _disagreement(told)
        if problem is not None:
            raise ValueError(problem)

    def _problem(self, saved: Sequence[dict[str, Any]]) -> str | None:
        try:
            for state in saved:
                self._optimizer._check_saved(state)
                check_missed(state)
        except ValueError as error:
            return str(error)
        groups = [group for state in saved for group in state["param_groups"]]
        theirs = next((group[PARTITION] for group in groups if PARTITION in group), None)
        return None if theirs is None else _mismatch(theirs, self._mine)


def _mismatch(theirs: Any, mine: Sequence[int]) -> str | None:
    if not isinstance(theirs, Sequence) or [type(number) for number in theirs] != [int] * 4:
        return (
            f"{PARTITION}={theirs!r} in the checkpoint's file for rank {mine[0]}: it must be four whole numbers, as "
            "they were saved. Load another checkpoint, or remove it from all groups and files"
        )
    if list(theirs[:2]) != list(mine[:2]):
        return (
            f"the checkpoint's file for rank {mine[0]} of {mine[1]} was written by rank {theirs[0]} of {theirs[1]}: "
            "give the files *zero_pp_rank_N_* back the names that they were saved under"
        )
    if theirs[2] == mine[2] and theirs[3] != mine[3]:
        return (
            f"the checkpoint's file for rank {mine[0]} divides the model's parameters in another way than this run: "
            "load it with the ZeRO stage, the parameter groups and their order, sub_group_size and "
            "round_robin_gradients that it was saved with, or through a universal checkpoint"
        )
    return None


def _disagreement(told: Sequence[tuple[str | None, list[float] | None]]) -> str | None:
    """What is wrong on another rank, or between the ranks."""
    for rank, (problem, _) in enumerate(told):
        if problem is not None:
            return f"rank {rank} found: {problem}"
    holders: dict[str, list[int]] = {}
    for rank, (_, state) in enumerate(told):
        holders.setdefault(repr(state), []).append(rank)
    if len(holders) == 1:
        return None
    held = " but ".join(f"{state} on {rank_failures.people(ranks)}" for state, ranks in holders.items())
    return (
        "the checkpoint's rank files are not of one run and one step: alphaadam_state [T, alpha, agreeing, "
        f"conflicting] is {held}. Put back the files that were saved together"
    )


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
