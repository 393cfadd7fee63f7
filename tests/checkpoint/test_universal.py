"""DeepSpeed's universal checkpoints: save on some ranks, convert, go on with fewer or more."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.models import tiny_llama, token_batches
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_training import deviation

pytestmark = pytest.mark.slow

STEPS, SAVED_AFTER = 8, 4
MODES = {"zero2": engine.config(2), "zero3": engine.config(3, sub_group_size=4000)}
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"lr": 3e-3, "alpha_warmup": 6},
    "delayed": {"lr": 3e-3, "sync": "delayed", "alpha_warmup": 6},
}


def run(
    mode: str,
    options: dict[str, Any],
    folder: str,
    *,
    save: bool = False,
    load: bool = False,
    client: type | None = None,
) -> dict[str, Any]:
    """Train a Llama of two groups; save on the way, or load and go on from there."""
    ds_config = {**MODES[mode], "checkpoint": {"load_universal": load}}
    optimizer = "AlphaAdam" if client is None else client.__name__
    started = engine.start(tiny_llama(seed=1 if load else 0), ds_config, options, client=True, optimizer=optimizer)
    if load:
        path, _ = started.load_checkpoint(folder, tag="universal")
        assert path is not None
    seen = []
    for step, batch in enumerate(token_batches(STEPS, 4)):
        if load and step < SAVED_AFTER:
            continue
        mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
        started.backward(started(input_ids=mine, labels=mine).loss)
        started.step()
        if save and step + 1 == SAVED_AFTER:
            started.save_checkpoint(folder, tag="saved")
        seen.append(engine.observe(started.basic_optimizer))
    result = {
        "params": engine.masters(started),
        "seen": seen,
        "decay": [group["weight_decay"] for group in started.basic_optimizer.param_groups],
    }
    if client is None:
        result["steps"] = started.basic_optimizer.metrics()["steps"]
    started.destroy()
    return result


def convert(folder: Path) -> None:
    """The command of docs/deepspeed.md, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder / "saved"), output_folder=str(folder / "universal"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip


def assert_goes_on(ranks: list[dict[str, Any]], straight: dict[str, Any]) -> None:
    for resumed in ranks:
        assert [alpha for alpha, _ in resumed["seen"]] == pytest.approx(
            [alpha for alpha, _ in straight["seen"][SAVED_AFTER:]], abs=1e-3
        )
        assert resumed["steps"] == straight["steps"] == STEPS
        assert resumed["decay"] == straight["decay"] == [0.1, 0.0]
        assert deviation(resumed["params"], straight["params"]) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_to_one_and_four(
    ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    straight = ranks2.run(run, mode, options, str(tmp_path), save=True)[0]
    convert(tmp_path)
    for ranks in (ranks1, ranks4):
        assert_goes_on(ranks.run(run, mode, options, str(tmp_path), load=True), straight)


def test_one_rank_to_two(ranks1: Ranks, ranks2: Ranks, tmp_path: Path) -> None:
    straight = ranks1.run(run, "zero3", OPTIONS["exact"], str(tmp_path), save=True)[0]
    convert(tmp_path)
    assert_goes_on(ranks2.run(run, "zero3", OPTIONS["exact"], str(tmp_path), load=True), straight)


@pytest.mark.parametrize("mode", MODES)
def test_from_adamw_and_back(ranks1: Ranks, ranks2: Ranks, tmp_path: Path, mode: str) -> None:
    """With gamma 1 the two are one algorithm, so the run after each change is that of AdamW alone."""
    adamw, ours = {"lr": 3e-3}, {"lr": 3e-3, "gamma": 1.0}
    alone = ranks2.run(run, mode, adamw, str(tmp_path / "a"), save=True, client=torch.optim.AdamW)[0]
    convert(tmp_path / "a")
    there = ranks1.run(run, mode, ours, str(tmp_path / "a"), load=True)[0]
    assert there["decay"] == alone["decay"]
    assert deviation(there["params"], alone["params"]) < 1e-5

    ranks2.run(run, mode, ours, str(tmp_path / "b"), save=True)
    convert(tmp_path / "b")
    back = ranks1.run(run, mode, adamw, str(tmp_path / "b"), load=True, client=torch.optim.AdamW)[0]
    assert deviation(back["params"], alone["params"]) < 1e-5


def test_options_given_now_win(ranks2: Ranks, tmp_path: Path) -> None:
    """A universal checkpoint is loaded past the optimizer, whose options must stay those it was built with."""
    ranks2.run(run, "zero3", OPTIONS["exact"], str(tmp_path), save=True)
    convert(tmp_path)
    resumed = ranks2.run(run, "zero3", {"lr": 3e-3, "gamma": 1.0}, str(tmp_path), load=True)[0]
    assert all(alpha == 1.0 for alpha, _ in resumed["seen"])
