"""The comparison of optimizers: what it computes from runs, that runs repeat, and that a sweep goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from alphaadam_dist import AlphaAdam
from alphaadam_dist.training.data import byte_level_bpe
from benchmarks.convergence import analysis, counterexamples, precision, protocol, report, runs, tasks, timing
from benchmarks.convergence.__main__ import main
from benchmarks.convergence.plots import draw
from benchmarks.convergence.protocol import Study
from benchmarks.convergence.runner import Runner, results_file
from benchmarks.convergence.runs import Job, Result
from benchmarks.convergence.trial import Task
from benchmarks.convergence.variants import ADAMW, ALPHAADAM, BY_NAME, PRECISIONS, VARIANTS

from .conftest import only_kernels

TINY = replace(
    tasks.SMALL, width=16, layers=1, heads=2, block=16, batch=2, steps=8, vocabulary=300, rates=(1e-3, 2e-3),
    fine_tuning_rates=(1e-3, 2e-3),
)  # fmt: skip


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tasks.Scale]:
    """Small enough to train in a blink, on text of its own."""
    data = tmp_path_factory.mktemp("data")
    for i in range(60):
        (data / f"{i}.txt").write_text(f"def f{i}(x): return x + {i}\n" * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPHAADAM_CACHE", str(only_kernels(tmp_path_factory.mktemp("study") / "cache")))
        patch.setattr(tasks, "PACKAGES", ("json", "tomllib"))
        patch.setattr(tasks, "topics", {f"topic {i}": f"Statement {i} is a statement. " * 40 for i in range(60)})
        yield replace(TINY, data=str(data))
        for cached in (tasks.corpus_named, tasks.blocks, tasks.bpe, tasks.manual, tasks.package_pieces):
            cached.cache_clear()


def test_paired_differences_and_their_interval() -> None:
    # by hand: differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303 at 2 degrees of freedom
    difference = analysis.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert difference.mean == pytest.approx(2.0)
    assert difference.half == pytest.approx(4.303 / math.sqrt(3))
    assert not difference.clear
    assert analysis.paired([1.1, 1.2], [0.1, 0.2]).clear
    assert math.isnan(analysis.paired([1.0, math.inf], [1.0, 1.0]).mean)
    with pytest.raises(ValueError, match="1 pairs: give 2 to 10"):
        analysis.paired([1.0], [1.0])


def test_first_below_interpolates() -> None:
    curve = [(10, 4.0), (20, 3.0), (30, 3.5), (40, 1.0)]
    assert analysis.first_below(curve, 3.25) == pytest.approx(17.5)
    assert analysis.first_below(curve, 4.5) == 10
    assert analysis.first_below(curve, 0.5) is None


def test_the_last_measurement_is_at_the_end() -> None:
    curve = runs.run(replace(TINY, steps=9), Job("skewed", ADAMW, 1e-2, seed=1, evaluations=3)).curve
    assert [step for step, _ in curve] == [333, 667, 1000]


def test_schedule_warms_up_and_ends_at_nothing() -> None:
    factors = [runs.warmup_and_cosine(100, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 1e-3


def test_every_optimizer_gets_its_rate_and_the_embedding_its_multiple() -> None:
    for variant in VARIANTS:
        groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "scale": scale} for scale in (1.0, 4.0)]
        optimizer = variant.build(groups, 0.01, steps=100, seed=0)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.04])
        decay = optimizer.param_groups[0]["weight_decay"]
        assert decay * variant.lr_scale == pytest.approx(0.1)
    warm = BY_NAME["AlphaAdam warm-up"].build(groups, 0.01, steps=100, seed=0)
    assert isinstance(warm, AlphaAdam)
    assert warm.defaults["alpha_warmup"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama", "finetune", "encoder"])
def test_a_run_repeats_bit_for_bit_and_depends_on_its_seed(name: str, scale: tasks.Scale) -> None:
    job = Job(name, ALPHAADAM, 1e-2, seed=1, evaluations=2)
    first = runs.run(scale, job)
    steps = next(task.steps for task in tasks.tasks(scale) if task.name == name)
    assert [step for step, _ in first.curve] == [steps // 2, steps]
    assert first == runs.run(scale, job)
    assert first.curve != runs.run(scale, replace(job, seed=2)).curve
    assert first.curve != runs.run(scale, replace(job, embedding=4.0)).curve


def test_all_optimizers_of_a_seed_start_from_the_same_weights_and_data(scale: tasks.Scale) -> None:
    one, two = (tasks.gpt(scale, seed=3) for _ in range(2))
    for a, b in zip(one.other, two.other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert one.loss(5).item() == two.loss(5).item()
    assert one.loss(5).item() != one.loss(6).item()


def test_a_model_given_by_its_folder_is_fine_tuned_with_its_own_tokenizer(scale: tasks.Scale, tmp_path: Path) -> None:
    model = tasks.new_llama(scale)
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    byte_level_bpe(tasks.corpus_named(scale.data), 280).save_pretrained(folder)
    trial = tasks.finetune(replace(scale, pretrained=folder), seed=1)
    assert trial.embedding is not None
    torch.testing.assert_close(trial.embedding[0], model.get_input_embeddings().weight, rtol=0, atol=0)
    train, _ = tasks.blocks(tasks.manual(), tasks.AutoTokenizer.from_pretrained(folder), scale.block)
    assert int(train.max()) < 280
    assert trial.loss(0).isfinite()


def test_no_worker_sees_a_part_of_the_manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAADAM_CACHE", str(tmp_path))
    monkeypatch.setattr(tasks, "topics", {"a": "first", "b": "second"})
    make = tasks.manual.__wrapped__
    write = Path.write_text
    seen_while_writing = []

    def slow(path: Path, text: str) -> int:
        written = write(path, text)
        seen_while_writing.append(list(tmp_path.glob("manual*")))
        if text == "second":
            monkeypatch.setattr(Path, "write_text", write)
            make()  # another worker, which is faster
        return written

    monkeypatch.setattr(Path, "write_text", slow)
    folder = Path(make())
    assert seen_while_writing == [[], []]
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a.txt": "first", "b.txt": "second"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
def test_clipping_bounds_the_gradient(monkeypatch: pytest.MonkeyPatch, scale: tasks.Scale) -> None:
    norms: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: None = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads if g is not None]))))
        real(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(tasks, "CLIP", 0.1)
    runs.run(scale, Job("gpt", ADAMW, 1e-3, seed=1))
    clipped, norms = norms, []
    runs.run(scale, Job("gpt", ADAMW, 1e-3, seed=1, clip=False))
    assert max(clipped) <= 0.1001
    assert max(norms) > 0.2


def test_counterexamples_have_the_gradients_they_are_about() -> None:
    means = {}
    for task in counterexamples.TASKS:
        trial = task.start(0)
        [x] = trial.other
        total = torch.zeros_like(x)
        for step in range(2000):
            total += torch.autograd.grad(trial.loss(step), x)[0]
        means[task.name] = (x.detach(), total / 2000)
    assert means["reddi"][1].mean().item() == pytest.approx(0.2, abs=0.57)  # 4 standard errors of 512,000 draws
    x, mean = means["skewed"]
    torch.testing.assert_close(mean, x, atol=0.6, rtol=0)  # 5 standard errors
    x, mean = means["rotated"]
    assert counterexamples.rotated(0).evaluate() == pytest.approx(float(x @ mean / 2), rel=1e-3)


def result(job: Job) -> Result:
    """Loss that falls in training, is best at rate 2e-3 and lower for AlphaAdam."""
    loss = 2 - 0.1 * (job.variant == ALPHAADAM) + abs(math.log(job.lr / 2e-3)) + 0.01 * job.seed
    loss -= 0.05 * (job.embedding == 4.0) + 1.0 * (job.length == 4 and job.lr < 2e-3)
    curve = [(i + 1, loss + (job.evaluations - 1 - i) / 10) for i in range(job.evaluations)]
    return Result(job, curve, 1.5, 2.0)


def all_rounds(scale: tasks.Scale) -> tuple[Study, dict[Job, Result]]:
    done: dict[Job, Result] = {}
    study = Study(tasks.tasks(scale), counterexamples.TASKS, VARIANTS, done)
    for name, jobs_of in protocol.ROUNDS.items():
        for task in study.tasks_of(name):
            done.update({job: result(job) for job in jobs_of(study, task)})
    return study, done


def test_rounds_tune_on_one_seed_and_judge_on_others() -> None:
    study, done = all_rounds(TINY)
    task: Task = study.tasks[0]
    adamw = BY_NAME[ADAMW]
    tuned = [job.seed for job in (*protocol.screening(study, task), *protocol.run_off(study, task))]
    assert not set(tuned) & set(protocol.SEEDS)
    assert protocol.best_rate(task, adamw, done) == 2e-3
    assert [protocol.final(task, adamw, done, seed).seed for seed in protocol.SEEDS] == [1, 2, 3, 4, 5]
    assert protocol.doubled(task, adamw, done, 1).lr == 4e-3
    assert protocol.embedding_tuned(task, adamw, done, 1).embedding == 4.0
    longer = protocol.four_times(task, adamw, done, 1)
    assert (longer.length, longer.lr) == (4, 1e-3)
    assert analysis.against(task, ALPHAADAM, ADAMW, done).mean == pytest.approx(-0.1)
    # AlphaAdam is at every step 0.1 ahead, which is one evaluation of eight
    assert analysis.reached_adamw(task, ALPHAADAM, done).share == pytest.approx(7 / 8)
    assert protocol.final(task, BY_NAME["Lion"], done, 1).lr == pytest.approx(1e-3)


def test_step_times_are_of_every_optimizer(scale: tasks.Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MEASURED", 3)
    study = Study(tasks.tasks(scale)[:1], (), VARIANTS, {})
    times = timing.step_times(study)["gpt"]
    assert times.keys() == {variant.name for variant in VARIANTS}
    assert all(model > 0 and update > 0 for model, update in times.values())


@pytest.mark.slow
def test_the_report_says_what_the_runs_say(tmp_path: Path, scale: tasks.Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    study, done = all_rounds(scale)
    times = {task.name: {variant.name: (2.0, 1.0) for variant in VARIANTS} for task in tasks.tasks(scale)}
    stem = tmp_path / "2000-01-01-convergence"
    report.write(stem, scale, study, times, "a machine", "2000-01-01")
    text = stem.with_suffix(".md").read_text()
    assert "| AlphaAdam | **-0.100 ± 0.000** |" in text
    assert "0.88 (5)" in text
    held = json.loads(stem.with_suffix(".json").read_text())
    assert len(held["runs"]) == len(done)
    pictures = draw(stem, study)
    assert len(pictures) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)

    # cut short: one final of the last task is missing, and all that came after
    task = study.tasks[-1]
    missing = protocol.final(task, VARIANTS[-1], done, protocol.SEEDS[-1])
    finals = {job for t in study.tasks for job in protocol.finals(study, t)}
    part = {
        job: r for job, r in done.items() if job != missing and (job.seed in protocol.TUNING_SEEDS or job in finals)
    }
    report.write(stem, scale, replace(study, done=part), times, "a machine", "2000-01-01")
    text = stem.with_suffix(".md").read_text()
    assert "## GPT" in text
    assert f"## {task.title}" not in text
    assert "no clipping" not in text


def test_a_sweep_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = results_file(TINY, tmp_path)
    jobs = [Job("rotated", ADAMW, lr, seed=1) for lr in (0.01, 0.1)]
    runner = Runner(TINY, file, workers=1)
    runner.pool = ThreadPoolExecutor(1)
    [first] = runner.results(jobs[:1])
    runner.close()
    file.write_text(file.read_text() + '{"job": {"task": "rot')  # killed while writing
    runner = Runner(TINY, file, workers=1)
    runner.pool = ThreadPoolExecutor(1)
    assert runner.done == {jobs[0]: first}
    assert len(list(runner.results(jobs))) == 2
    runner.close()
    assert Runner(TINY, file, workers=1).done.keys() == set(jobs)
    assert results_file(replace(TINY, steps=9), tmp_path) != file
    assert first.final == pytest.approx(runs.run(TINY, jobs[0]).final, rel=1e-6)


@pytest.mark.slow
def test_a_part_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(protocol, "COUNTEREXAMPLE_SEEDS", (1,))
    app = typer.Typer()
    app.command()(main)
    part = ["--task", "rotated", "--optimizer", "Lion", "--workers", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, part)
    assert done.exit_code == 0, done.output
    [tables] = tmp_path.glob("*-convergence-part.md")
    rows = tables.read_text().split("### rotated ill-conditioned quadratic")[1].splitlines()
    assert [row.split(" | ")[0] for row in rows if row.startswith("| ")][2:] == ["| AdamW", "| AlphaAdam", "| Lion"]
    assert [path.name for path in tmp_path.glob("*.png")] == [f"{tables.stem}-counterexamples.png"]
    wrong = CliRunner().invoke(app, ["--optimizer", "Leon"])
    assert wrong.exit_code == 2
    assert "Leon; there are AdamW, AlphaAdam" in " ".join(wrong.output.split())


@pytest.mark.slow
def test_precisions_are_compared_with_fp32_of_the_same_beta2(
    scale: tasks.Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "RATES", {"llama": 2e-3})
    monkeypatch.setattr(precision, "LENGTHS", {1: ("llama",)})
    monkeypatch.setattr(precision, "SEEDS", (1, 2))
    runner = Runner(scale, tmp_path / "runs.jsonl", workers=1)
    runner.pool = ThreadPoolExecutor(1)
    jobs = [job for variant in PRECISIONS for job in precision.of("llama", variant, 1)]
    losses = {result.job: result.final for result in runner.results(jobs)}
    for row in (row for row in precision.report(runner, "head") if "beta2" in row):
        name, cell = row.strip("| ").split(" | ")
        own = [losses[job] for job in jobs if job.variant == name]
        base = [losses[job] for job in jobs if job.variant == f"fp32, {name.partition(', ')[2]}"]
        fp32 = name.startswith("fp32")
        assert cell == (f"{sum(own) / 2:.3f}" if fp32 else report.show(analysis.paired(own, base)))
        assert own != base or fp32
