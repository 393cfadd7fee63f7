"""``"no_decay"`` of a JSON-named optimizer: two groups by parameter name, in every ZeRO stage and under zero.Init."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam
from tests.hf import trainer
from tests.hf.test_trainer import check
from tests.models import Given, given_gradients
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_equality import assert_equal

pytestmark = pytest.mark.slow

WORDS = ["Bias", "norm"]  # in any case
SPARED = {"bias", "norm"}  # the parameters of Given that have one of them in their name
MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "zero0": (engine.config(0), False),
    "zero1": (engine.config(1), False),
    "zero2": (engine.config(2), False),
    "zero2-offload": (engine.config(2, offload=True), False),
    "zero2-bf16": (engine.config(2, "bf16"), False),
    "zero3": (engine.config(3, sub_group_size=200), False),
    "zero3-init": (engine.config(3, sub_group_size=200), True),
    "zero3-init-bf16": (engine.config(3, "bf16"), True),
}


def start(ds_config: dict[str, Any], options: dict[str, Any], zero_init: bool = False) -> Any:
    """The engine around Given with AlphaAdam from the JSON; the model may be born in partitions."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(ds_config), enabled=zero_init):
        model = Given()
    assert all(hasattr(param, "ds_id") == zero_init for param in model.parameters())
    return engine.start(model, ds_config, options, client=False, optimizer="AlphaAdam")


def train(mode: str, options: dict[str, Any]) -> dict[str, Any]:
    ds_config, zero_init = MODES[mode]
    started = start(ds_config, options, zero_init)
    seen = []
    for gradients in given_gradients(10):
        started.backward(started(gradients))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    result = {
        "params": engine.masters(started),
        "seen": seen,
        "decays": [group["weight_decay"] for group in started.basic_optimizer.param_groups],
    }
    started.destroy()
    return result


def alone(spared: set[str], dtype: torch.dtype) -> dict[str, Any]:
    """One process; the parameters named in ``spared`` are in a second group without decay."""
    model = Given().to(dtype).float()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [(n, p) for n, p in named if n not in spared], "weight_decay": 0.1}]
    if spared:
        groups.append({"params": [(n, p) for n, p in named if n in spared], "weight_decay": 0.0})
    optimizer = AlphaAdam(groups, lr=engine.LR)
    seen = []
    for gradients in given_gradients(10):
        for name, param in named:
            param.grad = gradients[name]
        optimizer.step()
        seen.append(engine.observe(optimizer))
    return {"params": {n: p.detach().clone() for n, p in named}, "seen": seen}


@pytest.mark.parametrize("mode", MODES)
def test_equals_two_groups_in_one_process(ranks2: Ranks, mode: str) -> None:
    """Bit for bit; and the parameters that do not decay are not those of a run in which everything does."""
    ranks = ranks2.run(train, mode, {"no_decay": WORDS})
    dtype = torch.bfloat16 if "bf16" in mode else torch.float32
    assert_equal(ranks, alone(SPARED, dtype))
    assert ranks[0]["decays"] == [0.1, 0.0]
    decayed = alone(set(), dtype)
    for name, param in ranks[0]["params"].items():
        assert torch.equal(param, decayed["params"][name]) == (name not in SPARED), name


@pytest.mark.parametrize("words", ["norm", [], ["norm", ""], ["norm", 3], {"norm": 1}, True])
def test_only_a_list_of_words(ranks2: Ranks, words: Any) -> None:
    with pytest.raises(Exception, match=r'no_decay=.*give a list of words, as in \["bias", "norm"\]'):
        ranks2.run(start, engine.config(2), {"no_decay": words})


def test_a_word_that_is_in_no_name(ranks2: Ranks) -> None:
    with pytest.raises(Exception, match=r"no_decay has 'layer_norm', which is in no parameter's name.*bias"):
        ranks2.run(start, engine.config(3), {"no_decay": ["bias", "layer_norm"]})


def test_a_client_optimizer_has_no_such_option() -> None:
    with pytest.raises(TypeError, match="no_decay"):
        AlphaAdam(Given().parameters(), no_decay=["norm"])


def save_and_load(mode: str, folder: str, saved: dict[str, Any], loaded: dict[str, Any]) -> Any:
    """Save after two steps with one JSON, load with another; alpha and T where that is taken."""
    ds_config, zero_init = MODES[mode]
    first = start(ds_config, saved, zero_init)
    for gradients in given_gradients(2):
        first.backward(first(gradients))
        first.step()
    first.save_checkpoint(folder, tag="x")
    first.destroy()
    second = start(ds_config, loaded, zero_init)
    try:
        second.load_checkpoint(folder, tag="x")
        return second.basic_optimizer._adopt().state()
    finally:
        second.destroy()


@pytest.mark.parametrize("mode", ["zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero3-init"])
@pytest.mark.parametrize("added", [True, False], ids=["added", "removed"])
def test_another_number_of_groups_is_refused(ranks2: Ranks, tmp_path: Path, mode: str, added: bool) -> None:
    options = [{}, {"no_decay": WORDS}] if added else [{"no_decay": WORDS}, {}]
    counts = (1, 2) if added else (2, 1)
    reason = rf"checkpoint has {counts[0]} parameter groups, this optimizer has {counts[1]}.*removing no_decay"
    with pytest.raises(Exception, match=reason):
        ranks2.run(save_and_load, mode, str(tmp_path), *options)


@pytest.mark.parametrize("mode", ["zero2", "zero3-init"])
def test_the_same_groups_are_taken(ranks2: Ranks, tmp_path: Path, mode: str) -> None:
    options = {"no_decay": WORDS}
    steps, alpha, *_ = ranks2.run(save_and_load, mode, str(tmp_path), options, options)[0]
    assert steps == 2
    assert alpha > 1


@pytest.mark.parametrize("build", [None, trainer.llama_under_zero_init], ids=["whole", "from_config"])
def test_under_the_trainer(ranks2: Ranks, tmp_path: Path, build: Any) -> None:
    """Beside "auto" values; HF builds the model in partitions where the config says ZeRO-3."""
    ranks = ranks2.run(trainer.train, str(tmp_path), trainer.auto_config(3, no_decay=["norm"]), build=build)
    check(ranks, trainer.alone(trainer.hf_groups), f"no_decay, {build}")
    assert [group["weight_decay"] for group in ranks[0]["groups"]] == [0.2, 0.0]


class Spares(nn.Module):
    """A model in which the words match everything, or only what is frozen."""

    def __init__(self, names: list[str], frozen: list[str]) -> None:
        super().__init__()
        for name in [*names, *frozen]:
            self.register_parameter(name, nn.Parameter(torch.ones(3), requires_grad=name not in frozen))


def group_sizes(names: list[str], frozen: list[str]) -> list[tuple[int, float]]:
    started = engine.start(Spares(names, frozen), engine.config(0), {"no_decay": ["norm"]}, False, "AlphaAdam")
    groups = [(len(group["params"]), group["weight_decay"]) for group in started.basic_optimizer.param_groups]
    started.destroy()
    return groups


def test_no_empty_groups(ranks2: Ranks) -> None:
    assert ranks2.run(group_sizes, ["norm1", "norm2"], [])[0] == [(2, 0.0)]
    assert ranks2.run(group_sizes, ["a", "b"], ["norm"])[0] == [(2, 0.1)]
    assert ranks2.run(group_sizes, ["a", "PreNorm"], ["norm"])[0] == [(1, 0.1), (1, 0.0)]
