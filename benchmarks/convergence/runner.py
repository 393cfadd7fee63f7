"""Many runs on several processes, and the file that keeps what they found, so that an interrupted sweep goes on."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers

from alphaadam_dist import rule
from alphaadam_dist.training import metrics
from alphaadam_dist.training.text import digest_of_data, digest_of_place
from benchmarks import baselines

from . import counterexamples, runs, source, tasks, text, trial
from .runs import Job, Result
from .tasks import Scale
from .trial import Setting
from .variants import BY_NAME

FILE = "runs.jsonl"


class Runner:
    """Runs jobs in worker processes of one thread each, and never the same job twice.

    Args:
        cache: the folder of the file that keeps results, a JSON object a line. Several sweeps may write to it. Lines
            whose key is another's, of other code, text or versions, are left where they are.
        workers: how many processes.
    """

    def __init__(self, scale: Scale, cache: Path, workers: int) -> None:
        self.scale, self.file, self.workers = scale, cache / FILE, workers
        cache.mkdir(parents=True, exist_ok=True)
        if self.file.exists() and not self.file.read_bytes().endswith(b"\n"):  # a kill cut a line short
            with open(self.file, "a") as file:
                file.write("\n")
        self.done: dict[Job, Result] = {}
        for entry in _entries(self.file):
            result = _from_entry(entry["result"])
            if result.job.variant in BY_NAME and entry["key"] == key(scale, result.job):
                self.done[result.job] = result

    def results(self, wanted: Callable[[], Iterable[Job]], minutes: float = math.inf) -> Iterator[Result]:
        """Run what is wanted until nothing is, or until no run may start any more; each result as soon as it is there.

        ``wanted`` names the jobs that are not in ``done``, the most urgent first; it is asked again after each result.
        """
        end = time.monotonic() + 60 * minutes
        running: dict[Future[Result], Job] = {}
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=start_worker) as pool:
            while True:
                for job in wanted() if time.monotonic() < end else ():
                    if len(running) == self.workers:
                        break
                    if job not in running.values():
                        running[pool.submit(runs.run, self.scale, job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    yield self.keep(future.result())

    def keep(self, result: Result) -> Result:
        """Remember a result, here and in the file."""
        metrics.append(self.file, {"key": key(self.scale, result.job), "result": asdict(result)})
        self.done[result.job] = result
        return result

    def publish(self, file: Path, jobs: Iterable[Job]) -> None:
        """Write these jobs' results as the cache's file has them, compressed: put there, they are not run again."""
        entries = [{"key": key(self.scale, job), "result": asdict(self.done[job])} for job in jobs]
        file.write_bytes(gzip.compress("".join(json.dumps(entry) + "\n" for entry in entries).encode(), mtime=0))


def key(scale: Scale, job: Job) -> str:
    """What a result depends on beside its job: scale, text, versions, the optimizer, and the code that runs."""
    return _key(scale, job.task, job.variant)


@functools.cache
def _key(scale: Scale, task: str, variant: str) -> str:
    """Of the library rule.py counts, for every other file is tested to do what it says."""
    one = BY_NAME[variant]
    code = [runs, trial]
    code += [counterexamples] if task in [t.name for t in counterexamples.TASKS] else [tasks, text]
    if not one.optimizer.__module__.startswith("torch."):
        code.append(rule)
    if one.optimizer.__module__ == baselines.__name__:
        code.append(baselines)
    given = [digest_of_data(scale.data), *map(digest_of_place, (scale.pretrained, scale.encoder, scale.glue))]
    tuned = [axis for axis in ("lookahead", "gamma") if axis in one.axes]
    options = (one.optimizer.__qualname__, one.options, tuned, one.lr_scale, one.ramp, one.bf16_parameters)
    versions = (sys.version, torch.__version__, transformers.__version__, tokenizers.__version__)
    return hashlib.sha256(repr((scale, given, options, versions, source.digest(*code))).encode()).hexdigest()[:16]


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file that others may be writing to. A line that a kill cut short is left out."""
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _from_entry(entry: dict[str, Any]) -> Result:
    job = Job(**{**entry["job"], "setting": Setting(**entry["job"]["setting"])})
    return Result(**{**entry, "job": job})


def start_worker() -> None:
    """What :func:`start_process` does, and the end with the process that started this one, however that ended."""
    start_process()
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def start_process() -> None:
    """One thread, operations that repeat bit for bit, and no chatter from libraries."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism costs on a GPU
    torch.use_deterministic_algorithms(True)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
