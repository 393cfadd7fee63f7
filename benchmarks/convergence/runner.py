"""Many runs on several processes, and the file that keeps what they found, so that an interrupted sweep goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from alphaadam_dist import rule
from alphaadam_dist.training import metrics
from benchmarks import baselines

from . import counterexamples, runs, tasks, trial, variants
from .runs import Job, Result
from .tasks import Scale


def results_file(scale: Scale, folder: Path) -> Path:
    """Where results for this scale and this code are kept: one JSON object a line.

    Of the library only rule.py counts, for every other file is tested to do what it says.
    """
    files = [module.__file__ for module in (rule, baselines, counterexamples, runs, tasks, trial, variants)]
    code = hashlib.sha256(repr((asdict(scale), torch.__version__)).encode())
    for file in files:
        assert file is not None
        code.update(Path(file).read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{code.hexdigest()[:12]}.jsonl"


class Runner:
    """Runs jobs in worker processes of one thread each, and never the same job twice."""

    def __init__(self, scale: Scale, file: Path, workers: int) -> None:
        self.scale, self.file = scale, file
        lines: list[bytes] = []
        if file.exists():
            written = file.read_bytes()
            whole = written[: written.rfind(b"\n") + 1]  # without a line that a kill cut short
            file.write_bytes(whole)
            lines = whole.splitlines()
        entries = [_from_entry(json.loads(line)) for line in lines]
        self.done: dict[Job, Result] = {result.job: result for result in entries}
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_process)

    def results(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """The result of every job, known ones first, each as soon as it is there."""
        jobs = list(dict.fromkeys(jobs))
        yield from (self.done[job] for job in jobs if job in self.done)
        futures = [self.pool.submit(runs.run, self.scale, job) for job in jobs if job not in self.done]
        for future in as_completed(futures):
            result = future.result()
            metrics.append(self.file, asdict(result))
            self.done[result.job] = result
            yield result

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _from_entry(entry: dict[str, Any]) -> Result:
    curve = [(int(step), float(loss)) for step, loss in entry["curve"]]
    return Result(Job(**entry["job"]), curve, entry["alpha_mean"], entry["alpha_peak"])


def start_process() -> None:
    """One thread, operations that repeat bit for bit, and no chatter from libraries."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism costs on a GPU
    torch.use_deterministic_algorithms(True)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
