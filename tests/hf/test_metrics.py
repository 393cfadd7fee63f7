"""alpha, agreement, evidence and T reach the logs of HF and of DeepSpeed, read only on steps that log."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from alphaadam_dist.statistics import Statistics
from tests.hf import trainer
from tests.models import tiny_llama, token_batches
from tests.ranks import Ranks
from tests.zero import engine

pytestmark = pytest.mark.slow

NAMES = ("alpha", "agreement", "evidence", "steps")
TELEMETRY = ("grad_norm", "update_norm")
STEPS = 6


class Reads:
    """Counts how often the statistics are read from the device: every way to the host goes through these."""

    METHODS = tuple((Statistics, name) for name in ("state", "alphas", "norm", "update_norm"))

    def __enter__(self) -> Reads:
        self.count = 0
        self._patch = pytest.MonkeyPatch()
        for holder, name in self.METHODS:
            self._patch.setattr(holder, name, self._counting(getattr(holder, name)))
        return self

    def _counting(self, method: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.count += 1
            return method(*args)

        return counted

    def __exit__(self, *_: Any) -> None:
        self._patch.undo()


def monitored(folder: str, every: int | None, accumulate: int = 1, **options: Any) -> dict[str, Any]:
    """Train under DeepSpeed with its CSV and TensorBoard monitors; the reads of each boundary, and what was true."""
    ds_config = engine.config(2, accumulate=accumulate)
    ds_config |= {
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "csv"},
        "tensorboard": {"enabled": True, "output_path": folder, "job_name": "tensorboard"},
    }
    if every is not None:
        ds_config["steps_per_print"] = every
    started = engine.start(tiny_llama(), ds_config, options, client=True, optimizer="AlphaAdam")
    reads, truth, samples = [], [], []
    for batch in token_batches(STEPS, 2 * accumulate):
        with Reads() as counted:
            for part in batch.chunk(2 * accumulate)[dist.get_rank() :: 2]:
                started.backward(started(input_ids=part, labels=part).loss)
                started.step()
        reads.append(counted.count)
        truth.append(started.basic_optimizer.metrics())
        samples.append(started.global_samples)
    started.destroy()
    return {"reads": reads, "truth": truth, "samples": samples}


def from_csv(folder: Path, name: str) -> list[tuple[int, float]]:
    with open(folder / "csv" / f"Train_AlphaAdam_{name}.csv") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["step", name]
    return [(int(step), float(value)) for step, value in rows]


def from_tensorboard(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize(
    ("every", "accumulate", "options"),
    [
        (2, 1, {}),
        (3, 2, {"sync": "delayed"}),
        (2, 1, {"scope": "layer"}),
        (2, 1, {"telemetry": True}),
        (3, 2, {"telemetry": True, "sync": "delayed"}),
    ],
    ids=["exact", "delayed-accumulated", "layer", "telemetry", "telemetry-delayed-accumulated"],
)
def test_monitor_of_deepspeed(
    ranks2: Ranks, tmp_path: Path, every: int, accumulate: int, options: dict[str, Any]
) -> None:
    """The numbers of every second or third step, from rank 0 alone; other steps, and other ranks, read nothing."""
    ranks = ranks2.run(monitored, str(tmp_path), every, accumulate, **options)
    logged = [step for step in range(1, STEPS + 1) if step % every == 0]
    assert [step for step, reads in enumerate(ranks[0]["reads"], 1) if reads] == logged
    assert ranks[1]["reads"] == [0] * STEPS
    for name in (*NAMES, *(TELEMETRY if "telemetry" in options else ())):
        expected = [(ranks[0]["samples"][step - 1], ranks[0]["truth"][step - 1][name]) for step in logged]
        assert from_csv(tmp_path, name) == expected
        written = from_tensorboard(tmp_path / "tensorboard", f"Train/AlphaAdam/{name}")
        assert [step for step, _ in written] == [step for step, _ in expected]
        assert [value for _, value in written] == pytest.approx([value for _, value in expected])
    values = ranks[0]["truth"][-1]
    assert 1.2 < values["alpha"] < 4
    assert 0.3 < values["agreement"] < 1
    assert 0.5 < values["evidence"] <= 1
    assert values["steps"] == STEPS
    assert len(from_tensorboard(tmp_path / "tensorboard", "Train/Samples/lr")) == STEPS, "what DeepSpeed writes stays"


def test_nothing_is_written_unasked(ranks2: Ranks, tmp_path: Path) -> None:
    """Without steps_per_print DeepSpeed names no steps to log at."""
    ranks = ranks2.run(monitored, str(tmp_path), None)
    assert [sum(result["reads"]) for result in ranks] == [0, 0]
    assert not list((tmp_path / "csv").glob("*AlphaAdam*"))


def under_the_trainer(folder: str, ds_config: dict[str, Any] | None, every: int, **options: Any) -> dict[str, Any]:
    """Train with the callback and TensorBoard after it; what each step reads, its log entry included."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerCallback
    from transformers.integrations import TensorBoardCallback

    from alphaadam_dist.training.callbacks import AlphaMetrics

    so_far: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            so_far.append(counted.count)

    def callbacks() -> list[Any]:
        writer = [TensorBoardCallback(SummaryWriter(folder))] if dist.get_rank() == 0 else []
        return [Watch(), AlphaMetrics(), *writer]

    client = None if ds_config is not None and "optimizer" in ds_config else {**trainer.ADAM, **options}
    with Reads() as counted:
        arguments = {"logging_steps": every, "eval_strategy": "steps", "eval_steps": every}
        result = trainer.train(
            folder, ds_config, arguments, client=client, callbacks=callbacks, watch=False, evaluate=True, state=False
        )
    so_far.append(counted.count)
    return {"reads": [after - before for before, after in itertools.pairwise(so_far)], "logs": result["logs"]}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (None, {}),
        (trainer.auto_config(2), {}),
        (trainer.client_config(3), {"sync": "delayed"}),
        (None, {"telemetry": True}),
        (trainer.client_config(3), {"sync": "delayed", "telemetry": True}),
    ],
    ids=["ddp", "zero2", "zero3-delayed", "ddp-telemetry", "zero3-delayed-telemetry"],
)
def test_logs_of_hf(ranks2: Ranks, tmp_path: Path, config: dict[str, Any] | None, options: dict[str, Any]) -> None:
    """Each entry with a training loss has what one process has at that step; other steps read nothing."""
    ranks = ranks2.run(under_the_trainer, str(tmp_path), config, 2, **options)
    groups = trainer.one_group if config is not None and "optimizer" in config else trainer.hf_groups
    expected = [in_numbers(seen, step) for step, seen in enumerate(trainer.alone(groups, options)["seen"], 1)]
    for result in ranks:
        assert [step for step, reads in enumerate(result["reads"], 1) if reads] == [2, 4, 6]
        entries = [entry for entry in result["logs"] if "loss" in entry]
        assert [entry["step"] for entry in entries] == [2, 4, 6]
        for entry in entries:
            truth = expected[entry["step"] - 1]
            assert {name: entry.get(name) for name in NAMES} == pytest.approx(truth, abs=1e-3)
        assert all("alpha" not in entry for entry in result["logs"] if "loss" not in entry)
        assert all(("update_norm" in entry) == ("telemetry" in options) for entry in entries)
    for name in NAMES:
        written = from_tensorboard(tmp_path, f"train/{name}")
        assert written == [(step, pytest.approx(expected[step - 1][name], abs=1e-3)) for step in (2, 4, 6)]
    if "telemetry" in options:
        logged = [(entry["step"], pytest.approx(entry["update_norm"])) for entry in entries]
        assert from_tensorboard(tmp_path, "train/update_norm") == logged


def in_numbers(seen: tuple[float, dict[str, float]], step: int) -> dict[str, float]:
    alpha, counts = seen
    share = counts["agree"] / (counts["agree"] + counts["conflict"])
    return {"alpha": alpha, "agreement": share, "evidence": counts["evidence_fraction"], "steps": step}


def monitored_trainer(folder: str) -> None:
    ds_config = trainer.auto_config(2)
    ds_config |= {"steps_per_print": 2}
    ds_config |= {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "csv"}}
    trainer.train(folder, ds_config)


def test_monitor_of_deepspeed_under_the_trainer(ranks2: Ranks, tmp_path: Path) -> None:
    """Accelerate sets steps_per_print to infinity, so no step is one to log at: the Trainer's logs have the numbers."""
    ranks2.run(monitored_trainer, str(tmp_path))
    assert (tmp_path / "csv" / "Train_Samples_lr.csv").exists()
    assert not list((tmp_path / "csv").glob("*AlphaAdam*"))
