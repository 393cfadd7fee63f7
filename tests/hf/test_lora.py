"""PEFT's LoRA: the frozen base holds no state, counts nowhere and does not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.hf import trainer
from tests.hf.test_trainer import check
from tests.models import tiny_llama
from tests.ranks import Ranks

pytestmark = pytest.mark.slow

RANK = 4
IN, OUT = 2 * RANK * (32 + 32), 2 * RANK * (32 + 16)  # in two layers: A of q_proj and v_proj, and their B
ADAPTERS = IN + OUT


def with_adapters(base: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        return get_peft_model(base, config)


def lora() -> nn.Module:
    return with_adapters(tiny_llama())


def other_lora() -> nn.Module:
    """Other adapters, so that a resumed run owes where it ends to the checkpoint."""
    model = lora()
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(1.0)
    return model


def lora_under_zero_init() -> nn.Module:
    return with_adapters(trainer.llama_under_zero_init())


def base_unmoved() -> list[Any]:
    """A callback that compares every frozen parameter with what it was, on all ranks."""
    import contextlib

    import deepspeed
    from transformers import TrainerCallback

    class BaseUnmoved(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            base = dict(tiny_llama().named_parameters())
            frozen = {n: p for n, p in kwargs["model"].named_parameters() if not p.requires_grad}
            assert len(frozen) == len(base)
            parted = [p for p in frozen.values() if hasattr(p, "ds_id")]
            with deepspeed.zero.GatheredParameters(parted) if parted else contextlib.nullcontext():
                for name, param in frozen.items():
                    plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
                    assert torch.equal(param, base[plain]), f"{name} moved"

    return [BaseUnmoved()]


@pytest.mark.parametrize(
    ("stage", "named", "build"),
    [
        (None, "client", lora),
        (2, "json", lora),
        (2, "client", lora),
        (3, "json", lora),
        (3, "json", lora_under_zero_init),
    ],
    ids=["ddp", "zero2-json", "zero2-client", "zero3-json", "zero3-json-init"],
)
def test_only_adapters_count(ranks2: Ranks, tmp_path: Path, stage: int | None, named: str, build: Any) -> None:
    """Everything counted is an adapter's; alpha and adapters are one process's, and the rest has not moved."""
    if named == "json":
        assert stage is not None
        config, client = trainer.auto_config(stage), None
    else:
        config, client = None if stage is None else trainer.client_config(stage), trainer.ADAM
    ranks = ranks2.run(trainer.train, str(tmp_path), config, client=client, build=build, callbacks=base_unmoved)
    alone = trainer.alone(trainer.one_group, model=lora())
    check(ranks, alone, f"LoRA {stage} {named}")
    for result in ranks:
        assert all("lora_" in name for name in result["params"])
        assert sum(param.numel() for param in result["params"].values()) == ADAPTERS
        _, agreement = result["seen"][-1]
        assert (agreement["agree"] + agreement["conflict"]) / agreement["evidence_fraction"] == pytest.approx(ADAPTERS)
        _, first = result["seen"][0]
        assert first["agree"] == OUT, "B starts at zero, so A has no gradient yet"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_equals_uninterrupted(ranks2: Ranks, tmp_path: Path, stage: int) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    straight = ranks2.run(trainer.train, str(tmp_path), trainer.auto_config(stage), saving, build=lora)
    checkpoint = str(tmp_path / "checkpoint-4")
    resumed = ranks2.run(trainer.train, str(tmp_path), trainer.auto_config(stage), build=other_lora, resume=checkpoint)
    for result, expected in zip(resumed, straight, strict=True):
        assert result["seen"] == expected["seen"][4:]
        assert result["state"] == expected["state"]
        for name, param in expected["params"].items():
            assert torch.equal(result["params"][name], param), name
