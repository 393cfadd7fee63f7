"""Files of a DeepSpeed checkpoint that are not those of the ranks that load them are noticed, and old ones load."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaadam_dist.zero.rank_files import PARTITION
from alphaadam_dist.zero.unused import MISSED
from tests.models import Given, given_gradients
from tests.ranks import RankError, Ranks
from tests.zero import engine
from tests.zero.test_equality import MODES

pytestmark = pytest.mark.slow

SAVED_IN = ["zero1", "zero2-offload", "zero3-sub-groups"]


def save(mode: str, folder: str, seed: int, optimizer: str = "AlphaAdam") -> None:
    started = engine.start(Given(), MODES[mode], {}, True, optimizer)
    for gradients in given_gradients(3, seed):
        started.backward(started(gradients))
        started.step()
    started.save_checkpoint(folder, tag="t")
    started.destroy()


def load(mode: str, folder: str, more: dict[str, Any] | None = None) -> list[Any]:
    """Load, take a step, and say what the next file would be marked with."""
    config = {**MODES[mode], "zero_optimization": {**MODES[mode]["zero_optimization"], **(more or {})}}
    started = engine.start(Given(1), config, {}, True, "AlphaAdam")
    path, _ = started.load_checkpoint(folder, tag="t")
    assert path is not None
    started.backward(started(given_gradients(1)[0]))
    started.step()
    marks = [group[PARTITION] for group in started.basic_optimizer.param_groups]
    started.destroy()
    return marks


def rank_files(folder: Path) -> list[Path]:
    return [next((folder / "t").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")) for rank in (0, 1)]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    held = torch.load(path, weights_only=False)
    state = held["optimizer_state_dict"]
    for group in (state.get("base_optimizer_state") or state["optimizer_state_dict"])["param_groups"]:
        change(group)
    torch.save(held, path)


@pytest.mark.parametrize("mode", [*SAVED_IN, "zero1-bf16-fp32-accumulation"])
def test_files_that_changed_places(ranks2: Ranks, tmp_path: Path, mode: str) -> None:
    ranks2.run(save, mode, str(tmp_path), 1)
    first, second = rank_files(tmp_path)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(RankError, match=r"file for rank 0 of 2 was written by rank 1 of 2: give the files") as error:
        ranks2.run(load, mode, str(tmp_path))
    assert "rank 1 of 2 was written by rank 0 of 2" in str(error.value)


@pytest.mark.parametrize("mode", SAVED_IN)
def test_a_file_of_another_run(ranks2: Ranks, tmp_path: Path, mode: str) -> None:
    ranks2.run(save, mode, str(tmp_path / "a"), 1)
    ranks2.run(save, mode, str(tmp_path / "b"), 2)
    shutil.copy(rank_files(tmp_path / "b")[1], rank_files(tmp_path / "a")[1])
    with pytest.raises(RankError, match=r"not of one run and one step: alphaadam_state .* on rank 0 but .* on rank 1"):
        ranks2.run(load, mode, str(tmp_path / "a"))


def test_a_file_of_adamws_among_ours(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save, "zero2", str(tmp_path / "a"), 1)
    ranks2.run(save, "zero2", str(tmp_path / "b"), 1, "AdamW")
    shutil.copy(rank_files(tmp_path / "b")[0], rank_files(tmp_path / "a")[0])
    with pytest.raises(RankError, match=r"alphaadam_state .* is None on rank 0 but \[3\.0, .* on rank 1"):
        ranks2.run(load, "zero2", str(tmp_path / "a"))


def test_one_rank_with_a_problem_stops_all(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save, "zero2", str(tmp_path), 1)
    edit(rank_files(tmp_path)[1], lambda group: group.update(amsgrad=True))
    with pytest.raises(RankError, match=r"rank 1 found: the checkpoint has amsgrad=True"):
        ranks2.run(load, "zero2", str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (PARTITION, "all"),
        (PARTITION, [0, 2]),
        (MISSED, [1]),
        (MISSED, {"one": -1}),
        (MISSED, {"one": "2"}),
    ],
    ids=str,
)
def test_marks_that_are_damaged_are_named(ranks2: Ranks, tmp_path: Path, key: str, value: Any) -> None:
    ranks2.run(save, "zero2", str(tmp_path), 1)
    edit(rank_files(tmp_path)[1], lambda group: group.update({key: value}))
    with pytest.raises(RankError, match=rf"{key}={re.escape(repr(value))} in .*: it must be"):
        ranks2.run(load, "zero2", str(tmp_path))


def test_parameters_in_another_order(ranks2: Ranks, tmp_path: Path) -> None:
    """DeepSpeed itself loads this: the flats have the same sizes."""
    ranks2.run(save, "zero2", str(tmp_path), 1)
    with pytest.raises(RankError, match=r"divides the model's parameters in another way .* round_robin_gradients"):
        ranks2.run(load, "zero2", str(tmp_path), {"round_robin_gradients": True})


@pytest.mark.parametrize("mode", SAVED_IN)
def test_old_files_load_and_are_marked_anew(ranks2: Ranks, tmp_path: Path, mode: str) -> None:
    ranks2.run(save, mode, str(tmp_path), 1)
    straight = ranks2.run(load, mode, str(tmp_path))
    assert [marks[0][:2] for marks in straight] == [[0, 2], [1, 2]]
    for path in rank_files(tmp_path):
        edit(path, lambda group: group.pop(PARTITION))
    assert ranks2.run(load, mode, str(tmp_path)) == straight


def test_renamed_parameters_load(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save, "zero2", str(tmp_path), 1)
    for path in rank_files(tmp_path):
        edit(path, lambda group: group[PARTITION].__setitem__(slice(2, 4), [1, 2]))
    ranks2.run(load, "zero2", str(tmp_path))


def test_adamws_files_load(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run(save, "zero2", str(tmp_path), 1, "AdamW")
    ranks2.run(load, "zero2", str(tmp_path))
