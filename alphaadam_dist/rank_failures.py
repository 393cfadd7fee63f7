"""What to say when a collective of AlphaAdam's fails: which one, on which rank, and who of the others is missing.

A backend knows a broken connection or a timeout, not who is to blame: under gloo the neighbours of a rank that died
notice at once, the rest when those have gone too. So each rank that notices signs a list in the store through which
the ranks first met, and names those who have not signed. Nothing here runs before something has failed. NCCL ends the
process itself; its own log then has the collective.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist


class RankLost(RuntimeError):
    """A rank failed, and this says which did not."""


PATIENCE = 5.0  # seconds for the others to notice too


@contextlib.contextmanager
def explaining(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around a collective: a RuntimeError inside becomes what ``explained`` makes of it."""
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        raise explained(error, what, group) from error


def explained(error: RuntimeError, what: str, group: dist.ProcessGroup | None) -> RankLost:
    """The error to raise in place of ``error``, which ``what`` met. Waits up to ``PATIENCE`` seconds.

    Names ranks by their global numbers.
    """
    ranks = dist.get_process_group_ranks(group)
    here = dist.get_rank()
    try:
        silent = _silent(ranks, here)
        if silent:
            missing = (
                f"not heard from: {people(silent)}, which died, hangs, or waits for one that did, or did not call "
                "step() this time (skipped it for a bad loss or an error of its own: all ranks must skip together)"
            )
        else:
            missing = "all other ranks have failed too"
    except RuntimeError:  # dist.DistStoreError too
        missing = "the store through which the ranks met is gone as well: rank 0, or its launcher, died"
    return RankLost(
        f"AlphaAdam's {what} failed on rank {here} of {people(ranks)}; {missing}. The first error in the logs of all "
        f"ranks counts: {error}"
    )


def people(ranks: Sequence[int]) -> str:
    """rank 3; ranks 0, 1, 2; and of many only the first."""
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (f", ... ({len(ranks)})" if len(ranks) > 8 else "")


def _silent(ranks: Sequence[int], here: int) -> list[int]:
    """Sign, and wait for the others to sign: the ranks that have not. One list, whatever a rank was doing."""
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + PATIENCE
    store.set(f"alphaadam/lost/{here}", "noticed")
    silent = [rank for rank in ranks if rank != here]
    while True:
        silent = [rank for rank in silent if not store.check([f"alphaadam/lost/{rank}"])]
        if not silent or time.monotonic() > deadline:
            return silent
        time.sleep(0.1)
