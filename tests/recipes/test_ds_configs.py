"""Every file of `ds_configs/` is good DeepSpeed, trains with the optimizer it names, and says what its name says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alphaadam_dist import AlphaAdam, plan
from alphaadam_dist.paths import config_path
from alphaadam_dist.training.ds_config import ds_config_path, load_ds_config, read_ds_config
from alphaadam_dist.training.rank import leave

FOLDER = config_path("ds_configs/zero2.json").parent
FILES = sorted(path.name for path in FOLDER.glob("*.json"))
FOR_HF = [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]
NVME = "zero3_nvme.json"
LLAMA = re.compile(r"llama_7b_(\d+)x(\d+)gb(_bf16)?\.json")

# What the Trainer fills in where a file says "auto".
FILLED_IN = {
    "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "enabled": False, "gradient_clipping": 1.0,
    "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
}  # fmt: skip


def filled_in(config: Any) -> Any:
    """The config with values for "auto"."""
    if not isinstance(config, dict):
        return config
    return {key: FILLED_IN[key] if value == "auto" else filled_in(value) for key, value in config.items()}


def understood() -> dict[str, Any]:
    """What DeepSpeed's own parser makes of each file, on as many ranks as it is for."""
    from deepspeed.runtime.config import DeepSpeedConfig

    def read(name: str, ranks: int) -> DeepSpeedConfig:
        mpu = SimpleNamespace(get_data_parallel_world_size=lambda: ranks)
        return DeepSpeedConfig(filled_in(json.loads((FOLDER / name).read_text())), mpu=mpu)

    result = {}
    for name in FILES:
        named = LLAMA.fullmatch(name)
        if named:  # the batch does not come out on twice as many
            with pytest.raises(AssertionError, match="batch"):
                read(name, 2 * int(named[1]))
        config = read(name, int(named[1]) if named else 1)
        zero = config.zero_config
        result[name] = {
            "stage": int(zero.stage),
            "offload": str(zero.offload_optimizer.device) if zero.offload_optimizer else None,
            "bf16": config.bfloat16_config.enabled,
            "accumulate": config.gradient_accumulation_steps,
            "batch": config.train_batch_size,
            "clip": config.gradient_clipping,
            "overlap": zero.overlap_comm,
        }
    return result


def trained(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two steps of one small model with each config, scaled down to its size, and what took them."""
    import deepspeed
    import torch

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(batch)).square().sum(-1).sub(1).square().mean()

    seen = []
    for config in configs:
        config = filled_in(config)
        accumulate = min(2, config["gradient_accumulation_steps"])
        config |= {"train_batch_size": 4 * accumulate, "train_micro_batch_size_per_gpu": 4}
        config["gradient_accumulation_steps"] = accumulate
        torch.manual_seed(0)
        model = Small()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        for _ in range(2 * accumulate):
            engine.backward(engine(torch.randn(4, 8, dtype=dtype)))
            engine.step()
        found = engine.basic_optimizer
        seen.append(
            {
                "optimizer": f"{type(found).__module__.partition('.')[0]}.{type(found).__qualname__}",
                "steps": engine.global_steps,
                "decay": sorted({group["weight_decay"] for group in found.param_groups}),
                "counted": sum(found.agreement[kind] for kind in ("agree", "conflict"))
                if isinstance(found, AlphaAdam)
                else None,
                "accumulated in": str(getattr(engine.optimizer, "gradient_accumulation_dtype", None)),
            }
        )
        engine.destroy()
    return seen


def main() -> None:
    """Answer to the configs on the standard input. One process for all: importing takes longer than the steps."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    print("SEEN" + json.dumps([understood(), trained(json.load(sys.stdin))]), flush=True)
    leave()


def deepspeed_on(configs: list[dict[str, Any]], seconds: float = 240) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What DeepSpeed understands of each file, and how these configs train, in a process that is its world's only."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
             "DS_ACCELERATOR": "cpu"}  # fmt: skip
    line = [sys.executable, "-m", __name__]
    done = subprocess.run(
        line, input=json.dumps(configs), env=os.environ | world, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    return tuple(json.loads(answer.removeprefix("SEEN")))  # type: ignore[return-value]


@pytest.mark.parametrize(("zero", "offload"), FOR_HF)
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


def test_look_ahead_is_alphaadam_without_masks(tmp_path: Path):
    """Also where the file asks for masks."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"optimizer": {"type": "AlphaAdam", "params": {"lr": 1e-4, "gamma": 0.1}}}))
    named = read_ds_config(path, "look-ahead")["optimizer"]
    assert named == {"type": "AlphaAdam", "params": {"lr": 1e-4, "gamma": 1.0, "lookahead": 0.25}}


def test_groups_go_to_alphaadam_and_the_trainer_makes_adamw_with_them(tmp_path: Path):
    groups = [{"match": "norm", "weight_decay": 0.0}]
    ours, baseline = (load_ds_config(2, False, name, groups) for name in ("AlphaAdam", "AdamW"))
    plain = load_ds_config(2, False, "AlphaAdam")
    assert ours["optimizer"]["params"].pop("groups") == groups
    assert ours == plain
    assert baseline == {key: value for key, value in plain.items() if key != "optimizer"}

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"optimizer": {"type": "AlphaAdam", "params": {"groups": groups}}}))
    with pytest.raises(ValueError, match=r"has groups=\[.*--groups is given too: give one of them"):
        read_ds_config(path, "AlphaAdam", groups)
    with pytest.raises(ValueError, match=r"has groups=\[.*only AlphaAdam knows: .*both the same groups with --groups"):
        read_ds_config(path, "AdamW")
    path.write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": {}}}))
    assert "scheduler" in read_ds_config(path, "AlphaAdam", groups)
    with pytest.raises(ValueError, match="has a scheduler, which writes one learning rate into all of AdamW's groups"):
        read_ds_config(path, "AdamW", groups)


@pytest.mark.parametrize("name", [name for name in FILES if "plain" in name or "llama" in name])
def test_where_a_script_reads_the_file_itself_nothing_is_left_to_hf(name: str):
    assert "auto" not in (FOLDER / name).read_text()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ('{"optimizer": ', "is cut short or no JSON"),
        ("[1, 2]", "holds a JSON list where an object belongs"),
        ('{"optimizer": "AlphaAdam"}', "has the optimizer 'AlphaAdam': write it as"),
        ('{"optimizer": {"type": "AlphaAdam", "params": [1]}}', "has the optimizer .*: write it as"),
        ('{"optimizer": {"params": {}}}', "has the optimizer None: name AlphaAdam or AdamW there"),
        ('{"optimizer": {"type": ["AdamW"]}}', "has the optimizer .*: name AlphaAdam or AdamW there"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path: Path, held: str, message: str):
    path = tmp_path / "config.json"
    path.write_text(held)
    with pytest.raises(ValueError, match=f"{path} {message}"):
        read_ds_config(path, "AlphaAdam")


@pytest.mark.slow
def test_deepspeed_understands_each_file_and_trains_with_it():
    names = [name for name in FILES if name != NVME]
    configs = [json.loads((FOLDER / name).read_text()) for name in names]
    baselines = [load_ds_config(zero, offload, "AdamW") for zero, offload in FOR_HF]
    parsed, seen = deepspeed_on(configs + baselines)

    assert sorted(parsed) == FILES
    for name, found in parsed.items():
        assert found["clip"] == 1.0, name
        assert found["overlap"] == (found["stage"] >= 2), name
        llama = LLAMA.fullmatch(name)
        if llama:
            stage, offload = first_choice(int(llama[1]), int(llama[2]), bf16=llama[3] is not None)
            # One batch, and so one learning rate, for all of a kind: 1024 sequences, 64 to fine-tune in bf16.
            batch = 64 if llama[3] else 1024
            assert (found["stage"], found["offload"]) == (stage, offload), name
            assert (found["batch"], found["bf16"]) == (batch, True), name
        else:
            stage, kind = re.fullmatch(r"zero(\d)_?(\w*)\.json", name).groups()  # type: ignore[union-attr]
            assert found["stage"] == int(stage), name
            assert found["offload"] == {"offload": "cpu", "nvme": "nvme"}.get(kind.removesuffix("_bf16")), name
            assert found["bf16"] == (kind == "plain" or kind.endswith("bf16")), name

    for name, found in zip(names, seen, strict=False):
        assert found["optimizer"] == "alphaadam_dist.AlphaAdam", name
        assert found["steps"] == 2, name
        assert found["counted"] > 0.9 * (8 * 8 + 3 * 8), name
        if LLAMA.fullmatch(name):
            assert found["decay"] == [0.0, 0.1], name
            assert found["accumulated in"] == f"torch.{'bfloat16' if 'bf16' in name else 'float32'}", name
    assert [found["optimizer"] for found in seen[len(names) :]] == ["torch.AdamW"] * len(FOR_HF)


def first_choice(gpus: int, memory: float, *, bf16: bool) -> tuple[int, str | None]:
    """The ZeRO stage that `alphaadam plan` chooses for Llama-7B, and where it offloads to."""
    cluster = plan.Cluster(gpus, 8, memory, plan.HEADROOM["bfloat16" if bf16 else None])
    planned = (plan.rows_in_bf16 if bf16 else plan.rows)(plan.shapes("llama-7b"), cluster)
    row = plan.first_fit(planned, plan.DEEPSPEED_ORDER, cluster)
    assert row is not None
    stage, _, offload = row.sharding.partition(", ")
    return int(stage.removeprefix("ZeRO-")), "cpu" if offload else None


def test_the_nvme_file_asks_for_what_is_served_there():
    config = json.loads((FOLDER / NVME).read_text())
    assert config["optimizer"]["params"]["sync"] == "delayed"
    assert config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.nvme
@pytest.mark.timeout(3600)
def test_the_nvme_file_trains(tmp_path: Path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's NVMe offload needs libaio: apt-get install libaio-dev")
    config = json.loads((FOLDER / NVME).read_text())
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path)
    _, (found,) = deepspeed_on([config], seconds=3000)
    assert (found["optimizer"], found["steps"]) == ("alphaadam_dist.AlphaAdam", 2)


if __name__ == "__main__":
    main()
