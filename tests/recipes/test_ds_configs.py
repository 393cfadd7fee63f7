"""Every file of `ds_configs/` starts DeepSpeed and takes a step with the optimizer it names."""

import json
import os
import subprocess
import sys

import pytest

from alphaadam_dist.training.ds_config import ds_config_path, load_ds_config

CONFIGS = [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]

# One process for all: importing torch and DeepSpeed takes longer than the steps.
_STEP_EACH = """
import json, sys, torch, deepspeed
from alphaadam_dist.training.callbacks import find_alpha_optimizer
from alphaadam_dist.training.ds_config import load_ds_config
from tests.recipes.test_ds_configs import CONFIGS, resolved
seen = []
for optimizer in ("AlphaAdam", "AdamW"):
    for zero, offload in CONFIGS:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=resolved(load_ds_config(zero, offload, optimizer))
        )
        loss = engine(torch.ones(4, 8)).square().mean()
        engine.backward(loss)
        engine.step()
        found = engine.basic_optimizer
        seen.append([optimizer, zero, offload, f"{type(found).__module__}.{type(found).__qualname__}"])
        engine.destroy()
print("SEEN" + json.dumps(seen))
"""


def resolved(config: dict) -> dict:
    """The config with the values the Trainer would fill in."""
    params = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    config["optimizer"]["params"] |= params
    config["bf16"]["enabled"] = False
    config["gradient_clipping"] = 1.0
    config |= {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    return config


@pytest.mark.parametrize(("zero", "offload"), CONFIGS)
def test_the_file_says_what_its_name_says(zero: int, offload: bool):
    config = json.loads(ds_config_path(zero, offload).read_text())
    assert config["zero_optimization"]["stage"] == zero
    assert ("offload_optimizer" in config["zero_optimization"]) == offload
    # Unnamed, DeepSpeed clips at 1.0.
    assert config["gradient_clipping"] == "auto"
    # Anything but false makes Accelerate swap a client's optimizer for DeepSpeed's under offload.
    assert config.get("zero_force_ds_cpu_optimizer", True) == (not offload)


def test_adamw_differs_in_nothing_but_the_optimizer():
    ours, baseline = (load_ds_config(2, False, name) for name in ("AlphaAdam", "AdamW"))
    assert baseline["optimizer"]["params"].pop("torch_adam") is True
    assert ours["optimizer"].pop("type") == "AlphaAdam"
    assert baseline["optimizer"].pop("type") == "AdamW"
    assert ours == baseline


@pytest.mark.slow
def test_each_config_takes_a_step():
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _STEP_EACH], env=os.environ | world, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    seen = json.loads(line.removeprefix("SEEN"))
    assert len(seen) == 2 * len(CONFIGS)
    for optimizer, zero, offload, found in seen:
        expected = "torch.optim.adamw.AdamW" if optimizer == "AdamW" else "alphaadam_dist.optimizer.AlphaAdam"
        assert found == expected, (optimizer, zero, offload)
