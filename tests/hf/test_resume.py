"""Stop the Trainer, start another from its checkpoint: bit for bit what never stopping gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf import trainer
from tests.ranks import Ranks

pytestmark = pytest.mark.slow

SAVED_AFTER = 4
CASES: dict[str, dict[str, Any]] = {
    "zero2-json-scheduler-of-deepspeed": {"ds_config": trainer.auto_config(2, scheduler=True)},
    "zero3-json-scheduler-of-hf": {"ds_config": trainer.auto_config(3, alpha_warmup=5)},
    "zero2-offload-delayed": {
        "ds_config": {
            **trainer.client_config(2, offload_optimizer={"device": "cpu", "pin_memory": False}),
            "zero_force_ds_cpu_optimizer": False,
        },
        "client": {**trainer.ADAM, "sync": "delayed", "alpha_warmup": 5},
    },
    "ddp": {"ds_config": None, "client": {**trainer.ADAM, "alpha_warmup": 5}},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(ranks2: Ranks, tmp_path: Path, case: str) -> None:
    """The resumed model starts from other weights, so that only the checkpoint can explain where it ends."""
    saving = {"save_strategy": "steps", "save_steps": SAVED_AFTER}
    straight = ranks2.run(trainer.train, str(tmp_path), arguments=saving, **CASES[case])
    checkpoint = tmp_path / f"checkpoint-{SAVED_AFTER}"
    resumed = ranks2.run(trainer.train, str(tmp_path), seed=1, resume=str(checkpoint), **CASES[case])
    for result, expected in zip(resumed, straight, strict=True):
        assert len(result["seen"]) == trainer.STEPS - SAVED_AFTER
        assert result["seen"] == expected["seen"][SAVED_AFTER:]
        assert result["state"] == expected["state"]
        assert result["state"][0] == trainer.STEPS
        assert result["groups"] == expected["groups"]
        for name, param in expected["params"].items():
            assert torch.equal(result["params"][name], param), name
