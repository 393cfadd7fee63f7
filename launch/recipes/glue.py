"""The eight GLUE tasks: their columns, labels and metrics, from the hub or from local CSV and TSV files.

The metrics are GLUE's (Wang et al. 2018, arXiv 1804.07461, table 1).
"""

import csv
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas
from datasets import Dataset, Value, load_dataset
from torch import Tensor
from torch.nn import functional

Numbers = npt.NDArray[Any]
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def accuracy(predicted: Numbers, true: Numbers) -> float:
    """The share of equal labels."""
    return float(np.mean(predicted == true))


def f1(predicted: Numbers, true: Numbers) -> float:
    """The harmonic mean of precision and recall of label 1; 0 where label 1 is never predicted correctly."""
    hits = np.sum((predicted == 1) & (true == 1))
    return float(2 * hits / max(np.sum(predicted == 1) + np.sum(true == 1), 1))


def matthews(predicted: Numbers, true: Numbers) -> float:
    """The correlation of two sets of labels 0 and 1; 0 where one set has a single label."""
    return pearson(predicted, true)


def pearson(predicted: Numbers, true: Numbers) -> float:
    """The linear correlation; 0 where one side does not vary."""
    a, b = (x.astype(np.float64) - np.mean(x, dtype=np.float64) for x in (predicted, true))
    norm = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / norm) if norm > 0 else 0.0


def spearman(predicted: Numbers, true: Numbers) -> float:
    """The linear correlation of the ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(true))


def _ranks(values: Numbers) -> Numbers:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


@dataclass(frozen=True)
class Task:
    """One task. `labels` are the names of labels 0, 1, ...; none for stsb, whose label is a number from 0 to 5."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[Callable[[Numbers, Numbers], float], ...]
    held_out: str = "validation"

    @property
    def label_type(self) -> str:
        """The datasets type of a label."""
        return "int64" if self.labels else "float32"

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(metric.__name__ for metric in self.metrics)

    def compute(self, evaluated: Any) -> dict[str, float]:
        """For the Trainer: the metrics of an EvalPrediction, of logits [rows, labels] or values [rows, 1]."""
        logits, true = np.asarray(evaluated.predictions), np.asarray(evaluated.label_ids)
        predicted = logits.argmax(axis=1) if self.labels else logits.reshape(-1)
        return {metric.__name__: metric(predicted, true) for metric in self.metrics}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """For the Trainer: cross-entropy, or squared error of stsb, over the `num_items_in_batch` rows of a step.

        The models' own loss is a mean over a rank's batch. The Trainer would multiply it by the number of ranks and add
        it up over accumulated batches.
        """
        logits = outputs["logits"].float()
        if self.labels:
            total = functional.cross_entropy(logits, labels, reduction="sum")
        else:
            total = functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


_PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), (matthews,)),
    "sst2": Task(("sentence",), ("negative", "positive"), (accuracy,)),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent"), (accuracy, f1)),
    "stsb": Task(_PAIR, (), (pearson, spearman)),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), (accuracy, f1)),
    "mnli": Task(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), (accuracy,), "validation_matched"
    ),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment"), (accuracy,)),
    "rte": Task(_PAIR, ("entailment", "not_entailment"), (accuracy,)),
}


def load_task(name: str, data: Path | None, held_out: Path | None) -> tuple[Dataset, Dataset]:
    """The rows to train on and to measure on, with the task's columns and `label`.

    Args:
        name: the task; without files it comes from the hub (nyu-mll/glue, its validation set for measuring).
        data, held_out: CSV or TSV files with a header; labels are numbers or the task's names for them.

    Raises:
        ValueError: one file without the other, a missing column, or a label that the task does not have.
    """
    task = TASKS[name]
    if data is None and held_out is None:
        found = load_dataset("nyu-mll/glue", name)
        return found["train"], found[task.held_out]
    if data is None or held_out is None:
        given, missing = ("data", "held-out") if held_out is None else ("held-out", "data")
        raise ValueError(f"--{given} without --{missing}: give both files, or neither for GLUE's own data")
    return _read(task, name, data), _read(task, name, held_out)


def _read(task: Task, name: str, path: Path) -> Dataset:
    if path.suffix not in _SEPARATORS or not path.is_file():
        raise ValueError(f"{path} is not a CSV or TSV file: give one that exists and ends with .csv or .tsv")
    columns = [*task.columns, "label"]
    try:
        # Text stays text: neither quotes in a TSV nor words such as NA and null mean anything. Without index_col=False,
        # where rows are longer than the header, pandas would take the first column as the index and shift the others.
        quoting = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            rows = pandas.read_csv(
                path,
                sep=_SEPARATORS[path.suffix],
                dtype=str,
                keep_default_na=False,
                quoting=quoting,
                index_col=False,
            )
    except pandas.errors.ParserWarning:
        raise ValueError(f"{path} has rows with more columns than its header: correct them") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if rows.empty:
        raise ValueError(f"{path} has no rows: give some")
    missing = [column for column in columns if column not in rows]
    if missing:
        raise ValueError(f"{path} has the columns {', '.join(rows)}: --task {name} needs {', '.join(columns)}")
    texts = {column: rows[column].tolist() for column in task.columns}
    labels = [_label(task, said, f"{path}, row {i + 1}") for i, said in enumerate(rows["label"])]
    return Dataset.from_dict({**texts, "label": labels}).cast_column("label", Value(task.label_type))


def _label(task: Task, said: str, where: str) -> float:
    if said in task.labels:
        return task.labels.index(said)
    allowed = f"one of {', '.join(task.labels)}, or its number" if task.labels else "a number from 0 to 5"
    try:
        value = float(said)
    except ValueError:
        raise ValueError(f"{where}: the label is {said!r}; it must be {allowed}") from None
    if not (value in range(len(task.labels)) if task.labels else 0 <= value <= 5):
        raise ValueError(f"{where}: the label is {said!r}; it must be {allowed}")
    return value
