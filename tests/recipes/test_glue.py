"""GLUE's tasks: metrics against values worked out by hand, and local files read as they are."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from recipes import glue
from recipes.glue import TASKS, load_task

PREDICTED = np.array([1, 1, 1, 0, 0, 0, 0, 1])
TRUE = np.array([1, 1, 0, 0, 0, 1, 0, 0])  # 2 hits, 2 false alarms, 1 miss, 3 rightly left out


def test_metrics_of_labels():
    assert glue.accuracy(PREDICTED, TRUE) == 5 / 8
    assert glue.f1(PREDICTED, TRUE) == pytest.approx(4 / 7)  # precision 1/2, recall 2/3
    assert glue.matthews(PREDICTED, TRUE) == pytest.approx((2 * 3 - 2 * 1) / (4 * 3 * 4 * 5) ** 0.5)


def test_metrics_of_labels_that_do_not_vary_are_zero():
    none = np.zeros(4)
    assert glue.f1(none, none) == 0
    assert glue.matthews(none, np.array([0, 1, 0, 1])) == 0


def test_correlations():
    assert glue.pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 7.0])) == pytest.approx(5 / 28**0.5)
    assert glue.spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 700.0])) == pytest.approx(1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert glue.spearman(np.array([1.0, 5.0, 5.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(
        4.5 / (4.5 * 5) ** 0.5
    )


def test_a_task_scores_what_the_trainer_gives():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    scores = TASKS["mrpc"].compute(SimpleNamespace(predictions=logits, label_ids=np.array([1, 0, 0])))
    assert scores == {"accuracy": 2 / 3, "f1": pytest.approx(2 / 3)}
    values = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    scores = TASKS["stsb"].compute(SimpleNamespace(predictions=values, label_ids=np.array([0.5, 2.5, 4.5])))
    assert scores == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}


def test_the_tasks_are_glues_own():
    assert set(TASKS) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}
    assert {name: task.scores for name, task in TASKS.items() if task.scores != ("accuracy",)} == {
        "cola": ("matthews",), "mrpc": ("accuracy", "f1"), "qqp": ("accuracy", "f1"), "stsb": ("pearson", "spearman"),
    }  # fmt: skip


def _tsv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_files_are_read_as_they_are(tmp_path: Path):
    """Quotes and words such as NA and null are text, labels are names or numbers, other columns are left out."""
    tsv = _tsv(tmp_path / "a.tsv", 'id\tsentence\tlabel\n7\tHe said "no\tnegative\n8\tNA\t1\n9\tnull\tpositive\n')
    csv = _tsv(tmp_path / "b.csv", 'label,sentence\n0,"One, two"\n')
    train, held_out = load_task("sst2", tsv, csv)
    assert train.to_dict() == {"sentence": ['He said "no', "NA", "null"], "label": [0, 1, 1]}
    assert held_out.to_dict() == {"sentence": ["One, two"], "label": [0]}


def test_scores_may_be_any_number_up_to_five(tmp_path: Path):
    file = _tsv(tmp_path / "a.csv", "sentence1,sentence2,label\na,b,3.5\nc,d,0\n")
    train, _ = load_task("stsb", file, file)
    assert train["label"][:] == [3.5, 0.0]
    assert train.features["label"].dtype == "float32"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "sentence\tlabel\nfine\t2\n", "row 1: the label is '2'; it must be one of negative, positive, or"),
        ("a.tsv", "sentence\tlabel\nfine\t1\nbad\tawful\n", "row 2: the label is 'awful'"),
        ("a.tsv", "sentence\tlabel\nfine\t0.5\n", "row 1: the label is '0.5'"),
        ("a.tsv", "text\tlabel\nfine\t1\n", "has the columns text, label: --task sst2 needs sentence, label"),
        ("a.tsv", "sentence\tlabel\n0\tfine\t1\n", "a.tsv has rows with more columns than its header"),
        ("a.csv", "sentence,label\n0,fine,1\n0,bad,0\n", "a.csv has rows with more columns than its header"),
        ("a.tsv", "sentence\tlabel\n", "a.tsv has no rows"),
        ("a.tsv", "", "a.tsv cannot be read"),
        ("a.txt", "fine 1\n", "a.txt is not a CSV or TSV file"),
    ],
)
def test_a_wrong_file_is_named_with_its_fix(tmp_path: Path, name: str, text: str, message: str):
    file = _tsv(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        load_task("sst2", file, file)


def test_a_lone_file_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="--data without --held-out: give both files"):
        load_task("sst2", tmp_path / "a.tsv", None)
