"""``alphaadam verify``: every sharding this world allows against one process, on the user's own machines."""


def verify() -> int:
    """Compare, and print the table on rank 0. Returns the exit code: 1 where a sharding's step is another. Collective.

    Raises:
        ValueError: the launcher does not say where the ranks meet.
    """
    import logging
    import os
    import warnings
    from contextlib import nullcontext

    import torch.distributed as dist
    from rich.console import Console

    from ..training import compilations
    from . import rendezvous, report, run

    warnings.simplefilter("ignore")  # torch and DeepSpeed warn of their own use of each other, on every rank
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # of how this gathers the parameters
    device = rendezvous.join()
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine, for each compiles by itself
    with compilations.announced(Console().print) if first_here else nullcontext():
        rows = list(run.rows(device, run.starts(device)))
    left_out = run.left_out(device)
    if dist.get_rank() == 0:
        report.show(Console(), rows, device, left_out)
    return int(any(row.problems for row in rows))
