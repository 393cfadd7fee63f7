"""HF's Trainer on two ranks does what a plain loop in one process does, step for step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf import trainer
from tests.ranks import Ranks
from tests.zero.test_training import alphas, deviation

pytestmark = pytest.mark.slow

NO_ACCUMULATION = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}


def warmup_decay(optimizer: Any) -> Any:
    """DeepSpeed's scheduler with what HF must fill in for its "auto" values."""
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    return WarmupDecayLR(optimizer, trainer.STEPS, 0.0, trainer.ADAM["lr"], trainer.ARGUMENTS["warmup_steps"])


def check(ranks: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    """Every rank trained with AlphaAdam, and as one process did: alpha to 1e-3, parameters to 1e-5 relative L2."""
    apart = deviation(ranks[0]["params"], alone["params"])
    print(f"{name}: deviation from one process {apart:.1e}")
    for result in ranks:
        assert result["optimizer"] == "AlphaAdam"
        assert alphas(result) == alphas(ranks[0])
    assert alphas(ranks[0]) == pytest.approx(alphas(alone), abs=1e-3)
    assert alphas(alone)[-1] > 1.2, "alpha never moved: the test would show nothing"
    assert ranks[0]["seen"][-1][1]["evidence_fraction"] == alone["seen"][-1][1]["evidence_fraction"]
    assert apart < 1e-5


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_value_auto(ranks2: Ranks, tmp_path: Path, stage: int) -> None:
    """What HF fills in reaches the optimizer; accumulation, clipping and the Trainer's cosine act as in a loop."""
    ranks = ranks2.run(trainer.train, str(tmp_path), trainer.auto_config(stage))
    check(ranks, trainer.alone(trainer.one_group), f"json {stage}")
    (group,) = ranks[0]["groups"]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-7, 0.2)
    assert ranks[0]["state"][0] == trainer.STEPS


@pytest.mark.parametrize(
    ("kind", "filled"),
    [("AlphaLion", {"betas": (0.8, 0.95), "weight_decay": 0.2}), ("AlphaSGD", {"weight_decay": 0.2})],
)
def test_auto_values_of_the_family(ranks2: Ranks, tmp_path: Path, kind: str, filled: dict[str, Any]) -> None:
    """HF fills in what is named and adds nothing, so an optimizer without betas or eps just does not name them."""
    config = trainer.auto_config(2)
    config["optimizer"] = {"type": kind, "params": dict.fromkeys(["lr", *filled], "auto")}
    for result in ranks2.run(trainer.train, str(tmp_path), config):
        (group,) = result["groups"]
        assert result["optimizer"] == kind
        assert {name: value for name, value in group.items() if name != "lr"} == filled
        assert result["state"][0] == trainer.STEPS


@pytest.mark.parametrize("named", ["json", "client"])
def test_schedulers_of_deepspeed(ranks2: Ranks, tmp_path: Path, named: str) -> None:
    config = trainer.auto_config(2, scheduler=True)
    client = None
    if named == "client":
        del config["optimizer"]
        client = trainer.ADAM
    ranks = ranks2.run(trainer.train, str(tmp_path), config, client=client)
    groups = trainer.one_group if named == "json" else trainer.hf_groups
    check(ranks, trainer.alone(groups, scheduler=warmup_decay), f"{named}, WarmupDecayLR")


@pytest.mark.parametrize(
    ("stage", "options"), [(None, {}), (2, {}), (2, {"sync": "delayed"}), (3, {"scope": "layer"})],
    ids=["ddp", "zero2", "zero2-delayed", "zero3-layer"],
)  # fmt: skip
def test_optimizer_cls_and_kwargs(ranks2: Ranks, tmp_path: Path, stage: int | None, options: dict[str, Any]) -> None:
    """The Trainer builds two groups, of which norms do not decay; also without DeepSpeed, under DDP."""
    config = None if stage is None else trainer.client_config(stage)
    ranks = ranks2.run(trainer.train, str(tmp_path), config, client={**trainer.ADAM, **options})
    alone = trainer.alone(trainer.hf_groups, options)
    if options.get("scope") == "layer":
        by_name = named_like(trainer.tiny_llama(), alone)
        for (alpha, _), expected in zip(ranks[0]["seen"], by_name, strict=True):
            assert alpha == pytest.approx(expected, abs=2e-2)  # one coordinate of a norm's 32 weighs that much
        assert deviation(ranks[0]["params"], alone["params"]) < 1e-5
    else:
        check(ranks, alone, f"client {stage} {options}")
    assert [group["weight_decay"] for group in ranks[0]["groups"]] == [0.2, 0.0]


def named_like(model: torch.nn.Module, alone: dict[str, Any]) -> list[dict[str, float]]:
    """alphas of a run whose parameters had no names, by the names of the model."""
    groups = trainer.hf_groups(model)
    names = {param: name for name, param in model.named_parameters()}
    places = {f"{i}.{j}": names[param] for i, group in enumerate(groups) for j, param in enumerate(group["params"])}
    return [{places[place]: alpha for place, alpha in seen.items()} for seen, _ in alone["seen"]]


@pytest.mark.slow
def test_adamw_for_comparison(ranks2: Ranks, tmp_path: Path) -> None:
    """How far torch.optim.AdamW is from itself, as a yardstick for the deviations printed above."""
    for stage in (2, 3):
        config = trainer.client_config(stage)
        theirs = ranks2.run(trainer.train, str(tmp_path), config, client=trainer.ADAM, optimizer=torch.optim.AdamW)
        alone = trainer.alone(trainer.hf_groups, optimizer=torch.optim.AdamW)
        apart = deviation(theirs[0]["params"], alone["params"])
        print(f"AdamW {stage}: deviation from one process {apart:.1e}")
        assert theirs[0]["optimizer"] == "AdamW"
        assert apart < 1e-5


def test_without_accumulation_and_clipping(ranks2: Ranks, tmp_path: Path) -> None:
    ranks = ranks2.run(trainer.train, str(tmp_path), trainer.auto_config(2), {**NO_ACCUMULATION, "max_grad_norm": 0.0})
    check(ranks, trainer.alone(trainer.one_group, clip=0.0), "no accumulation, no clipping")
    clipped = trainer.alone(trainer.one_group)
    assert deviation(ranks[0]["params"], clipped["params"]) > 1e-4, "clipping makes no difference here"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_evaluation_in_between(ranks2: Ranks, tmp_path: Path, stage: int) -> None:
    """Evaluating after every other step changes no bit."""
    quiet = ranks2.run(trainer.train, str(tmp_path), trainer.auto_config(stage))
    arguments = {"eval_strategy": "steps", "eval_steps": 2}
    ranks = ranks2.run(trainer.train, str(tmp_path), trainer.auto_config(stage), arguments, evaluate=True)
    assert sum("eval_loss" in entry for entry in ranks[0]["logs"]) == trainer.STEPS // 2
    for result, expected in zip(ranks, quiet, strict=True):
        assert result["seen"] == expected["seen"]
        assert result["state"] == expected["state"]
        for name, param in expected["params"].items():
            assert torch.equal(result["params"][name], param), name


@pytest.mark.slow
def test_bf16(ranks2: Ranks, tmp_path: Path) -> None:
    """Stages 2 and 3 average the same bf16 gradients of the same ranks: the same bits, clipping (by a norm) aside."""
    arguments = {**NO_ACCUMULATION, "bf16": True, "max_grad_norm": 0.0}
    two, three = (ranks2.run(trainer.train, str(tmp_path), trainer.auto_config(s), arguments)[0] for s in (2, 3))
    assert alphas(two) == alphas(three)
    assert alphas(two)[-1] > 1.2
    for name, param in two["params"].items():
        assert torch.equal(param, three["params"][name]), name
