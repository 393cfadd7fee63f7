"""The comparison of optimizers: how it tunes, what it makes of runs, that they repeat and a sweep goes on."""

from __future__ import annotations

import gzip
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.convergence import __main__, analysis, precision, protocol, report, runner, search, source, tasks
from benchmarks.convergence.analysis import Difference
from benchmarks.convergence.plots import draw
from benchmarks.convergence.protocol import Case, Missing, Seeds, Study
from benchmarks.convergence.runner import FILE, Runner
from benchmarks.convergence.runs import Job
from benchmarks.convergence.trial import Setting
from benchmarks.convergence.variants import ADAMW, ALPHAADAM, BY_NAME, LOOKAHEAD, PRECISIONS, TRIALS, VARIANTS

from .studies import TINY, Imagined, imagined

# ---- the search ---------------------------------------------------------------------------------------------------


def test_the_search_goes_on_until_the_best_is_inside() -> None:
    asked: list[Setting] = []

    def losses(settings: list[Setting]) -> list[float]:
        asked.extend(settings)
        # the best rate depends on the embedding's multiple: it must be tuned anew
        far = [((s.rate - 3) ** 2, (s.rate + 2 * s.embedding - 15) ** 2 / 4, abs(s.beta1 - 0.98)) for s in settings]
        return list(map(sum, far))

    best = search.search(Setting(0), ("rate", "beta1", "embedding"), losses)
    assert best == Setting(3, beta1=0.98, embedding=6)
    for axis in ("rate", "beta1", "embedding"):
        assert {*search.neighbours(axis, best)} < {*asked}
    assert search.search(Setting(0), ("rate",), losses).embedding == 0


def test_an_axis_with_ends_stops_there_and_says_so() -> None:
    def losses(settings: list[Setting]) -> list[float]:
        return [-s.beta1 for s in settings]

    best = search.search(Setting(2), ("rate", "beta1"), losses)
    assert best == Setting(2, beta1=0.99)
    assert search.at_end(best, ("rate", "beta1")) == ["beta1"]


def test_rates_are_a_factor_of_the_square_root_of_two_apart() -> None:
    assert [Setting(n).lr for n in (-1, 0, 1, 2)] == [7.071e-4, 1e-3, 1.414e-3, 2e-3]


# ---- the protocol -------------------------------------------------------------------------------------------------


def test_tuning_and_finals_share_no_seed() -> None:
    study = imagined()
    case, adamw = Case("gpt"), BY_NAME[ADAMW]
    assert study.best(case, adamw) == Setting(5, beta1=0.95, embedding=2)
    tuned = {job.seed for job in study.done}
    finals = [result.job.seed for result in study.finals(case, adamw)]
    assert not tuned & set(finals)
    assert len(finals) == len(set(finals)) >= 8


def test_every_optimizer_has_its_rate_beta1_and_embedding_tuned() -> None:
    study = imagined()
    for variant in (*VARIANTS, *TRIALS):
        setting = study.best(Case("llama"), variant)
        assert (setting.rate, setting.embedding, setting.beta1) == (5, 2, 0.95), variant.name


def test_a_longer_run_goes_out_from_the_shorter_ones_setting_and_is_tuned_itself() -> None:
    study = imagined()
    four = Case("gpt", length=4)
    assert study.best(four, BY_NAME[ADAMW]).rate == 6
    assert study.best(replace(four, length=16), BY_NAME[ADAMW]) == Setting(9, beta1=0.95, embedding=2)
    assert four.before == Case("gpt")
    assert Case("llama", size=16, length=16).before == Case("llama", size=4, length=4)
    large = protocol.SIZES.cases[1]
    assert study.best(large, BY_NAME[ADAMW]) == Setting(9, beta1=0.95, embedding=2)
    assert {job.setting.beta1 for job in study.done if job.size == 16} == {0.95}


def test_controls_are_tuned_under_their_own_condition() -> None:
    study = imagined()
    fixed = study.best(Case("gpt", fixed=("embedding",)), BY_NAME[LOOKAHEAD])
    assert (fixed.embedding, fixed.rate) == (0, 5)
    study.best(Case("gpt", clip=False), BY_NAME[LOOKAHEAD])
    unclipped = {job.setting.rate for job in study.done if not job.clip}
    assert unclipped >= {4, 5, 6}


def test_what_the_defaults_depend_on_is_wanted_first() -> None:
    study = replace(imagined(), done={})
    first = next(protocol.wanted(study, set()))
    assert (first.task, first.variant, first.length) == ("gpt", ADAMW, 1)  # where the search at 4x goes out from
    done = Imagined()
    order: list[tuple[str, int]] = []
    for case, variant in replace(study, done=done).cells():
        order.append((variant.name, case.length))
    assert order[:24] == [(v.name, 4) for _ in range(4) for v in protocol.CORE]
    finished: set[tuple[str, ...]] = set()
    assert not list(protocol.wanted(replace(study, done=done), finished))
    assert len(finished) == len(order) + 9 * len(VARIANTS)


# ---- statistics ---------------------------------------------------------------------------------------------------


def test_paired_differences_and_their_interval() -> None:
    # by hand, one document: differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303 at 2 degrees of freedom
    difference = analysis.paired([[2.0], [4.0], [6.0]], [[1.0], [2.0], [3.0]])
    assert difference.mean == pytest.approx(2.0)
    assert difference.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert not difference.clear
    assert difference.p == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641
    assert analysis.paired([[1.1], [1.2]], [[0.1], [0.2]]).clear
    assert math.isnan(analysis.paired([[1.0], []], [[1.0], [1.0]]).mean)
    with pytest.raises(ValueError, match="1 seeds: give at least 2"):
        analysis.paired([[1.0]], [[1.0]])


def test_the_interval_has_the_sampling_of_documents_in_it() -> None:
    # all seeds agree; the documents do not
    documents = [0.0, 1.0, 2.0, 5.0]
    difference = analysis.paired([documents, documents], [[0.0] * 4] * 2)
    assert difference.mean == 2.0
    assert difference.half == pytest.approx(3.1824 * stdev(documents) / 2, rel=1e-4)


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    lot = random.Random(0)
    held = 0
    for _ in range(150):
        of_documents = [lot.gauss(0, 1) for _ in range(30)]
        of_seeds = [lot.gauss(0, 0.3) for _ in range(8)]
        rows = [[s + d + lot.gauss(0, 1) for d in of_documents] for s in of_seeds]
        difference = analysis.paired(rows, [[0.0] * 30] * 8)
        held += abs(difference.mean) < difference.half
    assert 0.91 < held / 150 < 0.99


def test_students_quantiles() -> None:
    assert [analysis.quantile(n) for n in (2, 7, 30)] == pytest.approx([4.3027, 2.3646, 2.0423], rel=1e-4)


def test_holm_asks_more_of_each_where_there_are_many() -> None:
    def found(*ps: float) -> list[bool]:
        return analysis.holm([Difference(1.0, 0.5, p) for p in ps])

    assert found(0.04) == [True]
    assert found(0.04, 0.001, 0.03) == [False, True, False]  # 0.03 > 0.05 / 2
    assert found(0.04, 0.001, 0.02) == [True, True, True]
    assert found(math.nan, 0.001) == [False, True]


def test_a_gain_lasts_shrinks_or_is_gone() -> None:
    short = Difference(-0.2, 0.05, 0.0)
    words = [analysis.trend(short, Difference(*end, 0.0)) for end in ((-0.18, 0.05), (-0.05, 0.03), (-0.02, 0.03))]
    assert words == ["lasts", "shrinks", "gone"]
    assert analysis.trend(short, Difference(-0.4, 0.05, 0.0)) == "grows"
    assert analysis.trend(short, Difference(0.1, 0.05, 0.0)) == "worse"
    assert analysis.trend(Difference(0.0, 0.1, 1.0), Difference(-0.02, 0.03, 0.2)) == "none"
    assert analysis.trend(Difference(0.0, 0.1, 1.0), Difference(-0.05, 0.03, 0.0)) == "comes late"
    # four times the steps brought 0.2: half of that again is worth half of them
    assert analysis.saved(Difference(-0.1, 0.01, 0.0), 3.2, 3.0, 4) == pytest.approx(0.5)
    assert math.isnan(analysis.saved(Difference(-0.1, 0.01, 0.0), 3.05, 3.0, 4))


# ---- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_sweep_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    jobs = [Job("rotated", ADAMW, Setting(rate), seed=1) for rate in (7, 13)]

    def go_on(wants: list[Job], minutes: float = math.inf) -> Runner:
        one = Runner(TINY, tmp_path, workers=1)
        list(one.results(lambda: [job for job in wants if job not in one.done], minutes))
        return one

    first = go_on(jobs[:1]).done[jobs[0]]
    file = tmp_path / runner.FILE
    file.write_text(file.read_text() + '{"key": "rot')  # killed while writing
    assert go_on(jobs, minutes=0).done == {jobs[0]: first}
    assert go_on(jobs).done[jobs[0]] == first
    assert Runner(TINY, tmp_path, workers=1).done.keys() == set(jobs)
    assert Runner(replace(TINY, steps=9), tmp_path, workers=1).done == {}


@pytest.mark.slow
def test_workers_end_with_a_sweep_that_is_killed() -> None:
    program = """
import multiprocessing, time

from benchmarks.convergence.runner import start_worker

def work():
    start_worker()
    print("started", flush=True)
    time.sleep(100)

if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=work).start()
    time.sleep(100)
"""
    sweep = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert sweep.stdout is not None
    sweep.stdout.readline()
    sweep.kill()
    sweep.communicate(timeout=60)  # ends when nobody holds the other end: the worker does as long as it lives


def test_a_result_is_of_other_code_only_where_its_statements_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    code = '"""Words."""\n\n\ndef f(x):\n    """More words."""\n    return x + 1  # and more\n'
    same = '"""Other words."""\ndef f(x):\n    return x + 1\n'
    assert source.statements(code) == source.statements(same)
    assert source.statements(code) != source.statements(code.replace("+ 1", "+ 2"))
    jobs = [Job("rotated", name, Setting(7), seed=1) for name in (ADAMW, ALPHAADAM, "C-AdamW", LOOKAHEAD)]
    keys = [runner.key(TINY, job) for job in jobs]
    assert len(set(keys)) == 4
    monkeypatch.setitem(BY_NAME, LOOKAHEAD, replace(BY_NAME[LOOKAHEAD], options={"fused": True, "gamma": 0.9}))
    runner._key.cache_clear()
    changed = [runner.key(TINY, job) for job in jobs]
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True, True, True, False]
    runner._key.cache_clear()


# ---- the report ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_says_what_the_runs_say(tmp_path: Path) -> None:
    study = imagined()
    stem = tmp_path / "2000-01-01-convergence"
    page = stem.with_suffix(".md")
    tables = report.write(page, study, "2000-01-01, a machine")
    written = page.read_text()
    # Only the gains differ between optimizers, 0.1 and 0.2 over the length; the rest is rounding
    assert "| AlphaAdam | **-0.025 ± 0.000** |" in "\n".join(tables["Four times the steps: difference to AdamW"])
    gains = "**-0.200 ± 0.000** | **-0.050 ± 0.000** | **-0.013 ± 0.000** | shrinks |"
    assert f"| GPT from scratch | {LOOKAHEAD} | {gains}" in tables["Does the gain last? Length"]
    assert "beta1" in written
    assert "0.0057, 0.95, x 4" in "\n".join(tables["Short runs: the settings"])
    assert "GPT from scratch's embedding is tied: its multiple is the head's too" in written
    pictures = draw(stem, study)
    assert {path.stem.rsplit("convergence-")[1] for path in pictures} == {
        "four-times", "short", "options", "peers", "lasting",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_report_of_a_part_shows_what_is_finished() -> None:
    whole = imagined(stages=(protocol.ONE,))
    gpt = Case("gpt")
    for name in (ADAMW, ALPHAADAM):
        whole.finals(gpt, BY_NAME[name])
    part = replace(whole, done=dict(whole.done), counterexamples=())
    tables = report.all_tables(part)
    rows = tables["Short runs: difference to AdamW"]
    assert [row.split(" | ")[0] for row in rows if "±" in row] == ["| AlphaAdam"]
    assert rows[0] == "|  | GPT from scratch |"
    with pytest.raises(Missing):
        part.finals(gpt, BY_NAME[LOOKAHEAD])


def test_a_page_is_filled_with_the_tables_it_asks_for(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Words.\n\n<!-- table: A -->\nold\n<!-- end -->\n\n<!-- table: B -->\nkept\n<!-- end -->\nEnd.\n")
    assert report.fill(page, {"A": ["| a |"]}) == ["A", "B"]
    assert page.read_text() == (
        "Words.\n\n<!-- table: A -->\n| a |\n<!-- end -->\n\n<!-- table: B -->\nkept\n<!-- end -->\nEnd.\n"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_part_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: tasks.Scale) -> None:
    monkeypatch.setattr(protocol, "SMALL", scale)
    monkeypatch.setattr(__main__, "Seeds", lambda: Seeds((11,), (1, 2)))
    app = typer.Typer()
    app.command()(__main__.main)
    part = [
        "--task",
        "gpt",
        "--optimizer",
        "look-ahead",
        "--workers",
        "1",
        "--cache",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    assert "0 of 2" in CliRunner().invoke(app, [*part, "--status"]).output
    done = CliRunner().invoke(app, part)
    assert done.exit_code == 0, done.output
    assert "GPT from scratch, 1x steps" in done.output
    [tables] = tmp_path.glob("*-convergence-part.md")
    rows = tables.read_text().split("## Short runs: difference to AdamW")[1].splitlines()
    assert [row.split(" | ")[0] for row in rows if row.startswith("| ")][2:4] == ["| AdamW: loss", "| look-ahead"]
    assert "2 of 2" in CliRunner().invoke(app, [*part, "--status"]).output
    [published] = tmp_path.glob("*-convergence-part.jsonl.gz")
    (tmp_path / FILE).write_bytes(gzip.decompress(published.read_bytes()))
    assert "2 of 2" in CliRunner().invoke(app, [*part, "--status"]).output
    wrong = CliRunner().invoke(app, ["--optimizer", "Leon"])
    assert wrong.exit_code == 2
    assert "Leon; there are AdamW, AlphaAdam" in " ".join(wrong.output.split())


def test_large_units_are_single_runs_of_three_tasks() -> None:
    large = protocol.LARGE_SCALE
    study = Study(
        {task.name: task for task in tasks.tasks(large)}, protocol.LARGE, protocol.LARGE_SEEDS, Imagined(), ()
    )
    assert [case.task for case in protocol.LARGE[0].cases] == ["gpt", "finetune", "encoder"]
    for case, variant in study.cells():
        study.finals(case, variant)
    of_one = [job for job in study.done if (job.task, job.variant) == ("gpt", LOOKAHEAD)]
    assert {job.setting.lookahead for job in of_one} == {0.25}
    assert {job.length for job in of_one} == {1}


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_precisions_are_compared_with_fp32_of_the_same_beta2(
    scale: tasks.Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "RATES", {"llama": 2})
    monkeypatch.setattr(precision, "LENGTHS", {1: ("llama",)})
    monkeypatch.setattr(precision, "SEEDS", (1, 2))
    one = Runner(scale, tmp_path, workers=1)
    jobs = [job for variant in PRECISIONS for job in precision.of("llama", variant, 1)]
    list(one.results(lambda: [job for job in jobs if job not in one.done]))
    losses = {result.job: result.documents for result in one.done.values()}
    for row in (row for row in precision.report(one, "head") if "beta2" in row):
        name, cell = row.strip("| ").split(" | ")
        own = [losses[job] for job in jobs if job.variant == name]
        base = [losses[job] for job in jobs if job.variant == f"fp32, {name.partition(', ')[2]}"]
        fp32 = name.startswith("fp32")
        assert cell == (f"{fmean(map(fmean, own)):.3f}" if fp32 else report.show(analysis.paired(own, base)))
        assert own != base or fp32
