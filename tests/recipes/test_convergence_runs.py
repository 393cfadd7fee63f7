"""What is trained in the comparison of optimizers: runs that repeat, with text that is held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from alphaadam_dist import AlphaAdam, AlphaLion
from alphaadam_dist.training.data import byte_level_bpe
from benchmarks import baselines
from benchmarks.convergence import counterexamples, runs, tasks, text
from benchmarks.convergence.runs import Job
from benchmarks.convergence.trial import Setting, warmup_and_cosine
from benchmarks.convergence.variants import ADAMW, ALPHAADAM, BOTH, BY_NAME, LOOKAHEAD

from .studies import TINY

# ---- runs ---------------------------------------------------------------------------------------------------------


def test_schedule_warms_up_and_ends_at_nothing() -> None:
    factors = [warmup_and_cosine(100, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 1e-3


def built(name: str, setting: Setting | None = None) -> torch.optim.Optimizer:
    def group(scale: float, decays: bool) -> dict[str, Any]:
        return {"params": [torch.nn.Parameter(torch.ones(3, 3))], "scale": scale, "decays": decays}

    groups = [group(1.0, True), group(4.0, True), group(1.0, False)]
    return runs.build(BY_NAME[name], groups, setting or Setting(2), steps=100, seed=0)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_embeddings_multiple_leaves_its_decay_and_norms_do_not_decay(name: str) -> None:
    groups = built(name).param_groups
    assert [group["lr"] / BY_NAME[name].lr_scale for group in groups] == pytest.approx([2e-3, 8e-3, 2e-3])
    assert [group["lr"] * group["weight_decay"] for group in groups] == pytest.approx([2e-4, 2e-4, 0])


def test_options_that_depend_on_the_setting() -> None:
    setting = Setting(2, beta1=0.8, lookahead=0.5, gamma=0.25)
    for name, kind in (("AlphaAdam tau matched", AlphaAdam), ("AlphaLion tau matched", AlphaLion)):
        optimizer = built(name, setting)
        assert isinstance(optimizer, kind)
        assert optimizer.param_groups[0]["threshold"] == pytest.approx(0.25)
        assert optimizer.param_groups[0]["betas"][0] == 0.8
    chosen = [built(name, setting).param_groups[0] for name in (ALPHAADAM, LOOKAHEAD, BOTH)]
    assert [(group["gamma"], group["lookahead"]) for group in chosen] == [(0, 0), (1, 0.5), (0.25, 0.5)]
    assert built("AlphaAdam warm-up").defaults["alpha_warmup"] == 20


def test_look_ahead_falls_or_rises_over_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = baselines.LookAhead._update

    def update(self: baselines.LookAhead, held: list[Any]) -> None:
        seen.append(self.lookahead)
        real(self, held)

    monkeypatch.setattr(baselines.LookAhead, "_update", update)
    task = replace(counterexamples.TASKS[2], steps=4)
    monkeypatch.setattr(counterexamples, "TASKS", (task,))
    runs.run(TINY, Job("rotated", "look-ahead, falling", Setting(2, lookahead=0.5), seed=1))
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama", "finetune", "encoder"])
def test_a_run_repeats_bit_for_bit_and_depends_on_its_seed(name: str, scale: tasks.Scale) -> None:
    job = Job(name, ALPHAADAM, Setting(6), seed=1)
    first = runs.run(scale, job)
    assert first.documents == runs.run(scale, job).documents
    assert first.documents != runs.run(scale, replace(job, seed=2)).documents
    assert first.documents != runs.run(scale, replace(job, setting=Setting(6, embedding=2))).documents
    assert first.documents != runs.run(scale, replace(job, length=2)).documents
    assert first.final == pytest.approx(fmean(first.documents))


def test_all_optimizers_of_a_seed_start_from_the_same_weights_and_data(scale: tasks.Scale) -> None:
    one, two = (tasks.gpt(scale, seed=3) for _ in range(2))
    for a, b in zip(one.other, two.other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert one.loss(5).item() == two.loss(5).item()
    assert one.loss(5).item() != one.loss(6).item()


def test_norms_and_biases_are_a_group_that_does_not_decay(scale: tasks.Scale) -> None:
    start = tasks.gpt(scale, seed=1)
    matrices, embedding, rest = runs.parameter_groups(start, 4.0)
    assert all(param.ndim > 1 for param in matrices["params"])
    assert all(param.ndim == 1 for param in rest["params"])
    assert (matrices["decays"], embedding["decays"], rest["decays"]) == (True, True, False)
    assert [group["scale"] for group in (matrices, embedding, rest)] == [1.0, 4.0, 1.0]
    assert len(matrices["params"]) + len(rest["params"]) == len(start.other)


def test_a_size_is_a_multiple_of_the_parameters_in_the_layers(scale: tasks.Scale) -> None:
    def inside(of: tasks.Scale) -> int:
        return sum(param.numel() for param in tasks.new_llama(of).model.layers.parameters() if param.ndim > 1)

    assert inside(scale.times(4)) == 4 * inside(scale)
    assert scale.times(16).steps == scale.steps


# ---- text ---------------------------------------------------------------------------------------------------------


def test_documents_are_held_out_whole_and_none_is_most_of_the_set(scale: tasks.Scale) -> None:
    corpus = text.corpus(scale.data)
    assert len(corpus.train) + len(corpus.held_out) == 60
    assert not set(corpus.train["text"]) & set(corpus.held_out["text"])
    assert len(corpus.held_out) > 5
    for data in (
        text.language(scale.data, 257, scale.block),
        text.documentation(scale.data, text.bpe(scale.data, 257), scale.block),
    ):
        assert len(data.document) == len(data.held_out[0])
        assert data.document.bincount().tolist() == [text.BLOCKS] * len(corpus.held_out)


def test_docstrings_are_what_is_documented() -> None:
    source_of = '"""A module."""\n\nclass C:\n    """A class."""\n\n    def f(self):\n        return "no docstring"\n'
    assert text.docstrings(source_of) == "A module.\n\nA class."
    assert text.docstrings("print 'Python 2'") == ""


def test_the_encoders_held_out_pieces_are_of_files_it_never_saw(scale: tasks.Scale) -> None:
    data = text.packages(scale.data, scale.vocabulary, 4)
    seen = {tuple(row) for row in data.train[0].tolist()}
    held_out = [tuple(row) for row in data.held_out[0].tolist()]
    # pieces of four tokens occur twice here and there, but not a whole file of them
    by_file = [[row in seen for row, doc in zip(held_out, data.document, strict=True) if doc == d] for d in (0, 1)]
    assert not any(all(of_one) for of_one in by_file)
    assert set(data.train[1].tolist()) == {0, 1}
    assert max(data.document.bincount()) <= text.PIECES


def test_sentences_of_a_folder(tmp_path: Path, scale: tasks.Scale) -> None:
    for name, rows in (("train", ["good\t1", 'a "bad" one\t0']), ("dev", ["bad\t0"])):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    data = text.sentences(str(tmp_path), text.bpe(scale.data, 257), 8)
    assert data.train[0].shape == (2, 8)
    assert data.train[1].tolist() == [1, 0]
    assert data.document.tolist() == [0]


@pytest.mark.slow
def test_the_model_to_fine_tune_is_a_finished_one(scale: tasks.Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])
        real(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    tasks.pretrain(replace(scale, steps=5))
    assert len(rates) == tasks.FINISHED * 5
    assert rates[-1] < 0.01 * max(rates)


def test_a_model_given_by_its_folder_is_fine_tuned_with_its_own_tokenizer(scale: tasks.Scale, tmp_path: Path) -> None:
    model = tasks.new_llama(scale)
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    byte_level_bpe(text.corpus(scale.data), 280).save_pretrained(folder)
    trial = tasks.finetune(replace(scale, pretrained=folder), seed=1)
    assert trial.embedding is not None
    torch.testing.assert_close(trial.embedding[0], model.get_input_embeddings().weight, rtol=0, atol=0)
    assert trial.loss(0).isfinite()


@pytest.mark.slow
def test_an_encoder_given_by_its_folder_learns_sentences_in_bf16(scale: tasks.Scale, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    tasks.new_encoder(scale).save_pretrained(folder)
    text.bpe(scale.data, scale.vocabulary).save_pretrained(folder)
    rows = [f"{word} it\t{label}" for label, word in enumerate(("return", "define"))] * 10
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    large = replace(scale, block=64, steps=40, encoder=str(folder), glue=str(tmp_path), autocast=True)
    ends = [runs.run(large, Job("encoder", LOOKAHEAD, Setting(rate, lookahead=0.25), seed=1)) for rate in (-40, 8)]
    assert [len(end.documents) for end in ends] == [20, 20]
    assert ends[1].final < 0.5 * ends[0].final


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
    runs.run(scale, Job("gpt", ADAMW, Setting(0), seed=1))
    clipped, norms = norms, []
    runs.run(scale, Job("gpt", ADAMW, Setting(0), seed=1, clip=False))
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
    assert counterexamples.rotated(0).evaluate() == pytest.approx([float(x @ mean / 2)], rel=1e-3)
