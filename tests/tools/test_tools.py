"""Each tool's stock command under `alphaadam run` on two ranks, without a line of code: `make test-tools`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, STEPS, check, logged, start

pytestmark = [pytest.mark.tools, pytest.mark.timeout(2000)]

TRAINER = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "use_cpu": True, "report_to": "none",
    "seed": 1, "gradient_checkpointing": False, "bf16": False,
}  # fmt: skip


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_llama_factory(llama: Path, zero2: str, examples: list[tuple[str, str]], tmp_path: Path) -> None:
    """`llamafactory-cli train`: DDP by `optim`, ZeRO-2 by the JSON, and DDP by the environment."""
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in examples]
    (tmp_path / "garden.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"garden": {"file_name": "garden.json"}}))
    common = {
        **TRAINER, "model_name_or_path": str(llama), "stage": "sft", "do_train": True, "finetuning_type": "full",
        "dataset": "garden", "dataset_dir": str(tmp_path), "template": "default", "cutoff_len": 64,
        "save_strategy": "no", "overwrite_output_dir": True, "disable_gradient_checkpointing": True,
    }  # fmt: skip
    del common["gradient_checkpointing"]
    alphas = {}
    ways: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "ddp": ({"optim": "alphaadam"}, {}),
        "zero2": ({"deepspeed": zero2}, {}),
        "environment": ({}, {"ALPHAADAM_OPTIM": "alphaadam"}),
    }
    for name, (settings, variables) in ways.items():
        config = tmp_path / f"{name}.yaml"
        config.write_text(json.dumps({**common, **settings, "output_dir": str(tmp_path / name)}))  # JSON is YAML
        line = ["llamafactory-cli", "train", str(config)]
        start("llamafactory", line, tmp_path, FORCE_TORCHRUN="1", NPROC_PER_NODE="2", **variables)
        alphas[name] = logged(tmp_path / name)
    check(alphas)


def sft(way: str, data: Path, settings: dict[str, Any], folder: Path) -> list[float]:
    """TRL's own script for SFT under torchrun: alpha after each step."""
    common = {**TRAINER, "dataset_name": str(data), "eval_strategy": "no", "save_strategy": "steps",
              "save_steps": STEPS, "max_length": 64}  # fmt: skip
    line = words({**common, **settings, "output_dir": str(folder / way)})
    start("trl", ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "trl.scripts.sft", *line], folder)
    return logged(folder / way)


@pytest.fixture
def garden(examples: list[tuple[str, str]], tmp_path: Path) -> Path:
    """The examples as TRL reads them."""
    data = tmp_path / "garden"
    data.mkdir()
    rows = [json.dumps({"prompt": question, "completion": f" {answer}"}) for question, answer in examples]
    (data / "train.jsonl").write_text("\n".join(rows))
    return data


def test_trl(llama: Path, zero2: str, zero2_bare: str, garden: Path, tmp_path: Path) -> None:
    """DDP by --optim, ZeRO-2 by the JSON and by --optim."""
    ways = {
        "ddp": {"optim": "alphaadam"},
        "zero2": {"deepspeed": zero2},
        "zero2 by name": {"deepspeed": zero2_bare, "optim": "alphaadam"},
    }
    model = {"model_name_or_path": str(llama)}
    check({name: sft(name, garden, {**model, **settings}, tmp_path) for name, settings in ways.items()})


def test_qlora(llama: Path, zero2: str, garden: Path, tmp_path: Path) -> None:
    """Adapters over bitsandbytes' 4-bit weights, DDP and ZeRO-2: these weights are frozen, and only adapters count."""
    adapters = {"model_name_or_path": str(llama), "use_peft": True, "load_in_4bit": True}
    ways: dict[str, dict[str, Any]] = {"ddp": {"optim": "alphaadam"}, "zero2": {"deepspeed": zero2}}
    alphas = {name: sft(name, garden, {**adapters, **settings}, tmp_path) for name, settings in ways.items()}
    check(alphas, within=1e-2)  # there are a few thousand coordinates, of which each moves alpha by 1e-3


def test_ms_swift(llama: Path, zero2_bare: str, examples: list[tuple[str, str]], tmp_path: Path) -> None:
    """`swift sft`: DDP and ZeRO-2 by --optim, and DDP by the plugin, without `alphaadam run`."""
    data = tmp_path / "garden.jsonl"
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in examples]
    data.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    common = {
        **TRAINER, "model": str(llama), "model_type": "llama", "template": "default", "tuner_type": "full",
        "torch_dtype": "float32", "dataset": str(data), "split_dataset_ratio": 0, "max_length": 64, "save_steps": STEPS,
        "save_strategy": "steps", "add_version": False, "dataset_num_proc": 1, "dataloader_num_workers": 0,
        "check_model": False, "max_grad_norm": 1.0, "fp16": False,
    }  # fmt: skip
    plugin = str(ROOT / "alphaadam_dist/integrations/swift_plugin.py")
    ways = {
        "ddp": {"optim": "alphaadam"},
        "zero2": {"optim": "alphaadam", "deepspeed": zero2_bare},
        "plugin": {"external_plugins": plugin, "optimizer": "alphaadam"},
    }
    alphas = {}
    for name, settings in ways.items():
        line = ["swift", "sft", *words({**common, **settings, "output_dir": str(tmp_path / name)})]
        start("swift", line, tmp_path, run=name != "plugin", NPROC_PER_NODE="2", MODELSCOPE_CACHE=str(tmp_path))
        alphas[name] = logged(tmp_path / name)
    check(alphas)


def test_lightning(tmp_path: Path) -> None:
    """DDP and FSDP2, by the line in `configure_optimizers`."""
    script = str(Path(__file__).with_name("with_lightning.py"))
    alphas = {}
    for name in ("ddp", "fsdp2"):
        out = tmp_path / f"{name}.json"
        start("lightning", [sys.executable, script, str(out), name], tmp_path, run=False)
        alphas[name] = json.loads(out.read_text())
    check(alphas)


def test_lightning_with_the_step_in_backward(tmp_path: Path) -> None:
    """Lightning's own `step()` and DDP around it: alpha is that of the step after backward."""
    script = str(Path(__file__).with_name("with_lightning.py"))
    alphas = {}
    for name, options in (("ddp", ()), ("in backward", ("in-backward",)), ("fsdp2, in backward", ("in-backward",))):
        out, strategy = tmp_path / f"{name}.json", "fsdp2" if "fsdp2" in name else "ddp"
        start("lightning", [sys.executable, script, str(out), strategy, "delayed", *options], tmp_path, run=False)
        alphas[name] = json.loads(out.read_text())
    check(alphas)


def test_torchtune(llama: Path, examples: list[tuple[str, str]], tmp_path: Path) -> None:
    """`tune run` of its own recipe: FSDP2, by the config's line. It has no DDP: one rank has the batch of two."""
    data = tmp_path / "garden.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{question} {answer}"}) for question, answer in examples))
    alphas = {}
    for name, world in (("ddp", 1), ("fsdp2", 2)):
        out = tmp_path / f"{name}.json"
        config = {
            "optimizer": {"_component_": "alphaadam_dist.AlphaAdam", "lr": 1e-2},
            "tokenizer": {"_component_": "with_torchtune.Words", "folder": str(llama)},
            "dataset": {"_component_": "torchtune.datasets.text_completion_dataset", "source": "json",
                        "data_files": str(data), "split": "train"},
            "model": {"_component_": "with_torchtune.llama", "out": str(out)},
            "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "model_type": "LLAMA2",
                             "checkpoint_dir": str(llama), "checkpoint_files": ["model.safetensors"],
                             "output_dir": str(tmp_path / name), "recipe_checkpoint": None},
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger",
                              "log_dir": str(tmp_path / f"{name}-log")},
            "output_dir": str(tmp_path / name), "resume_from_checkpoint": False, "device": "cpu", "dtype": "fp32",
            "seed": 1, "shuffle": True, "epochs": 1, "max_steps_per_epoch": STEPS, "batch_size": 8 // world,
            "gradient_accumulation_steps": 1, "log_every_n_steps": 1, "enable_activation_checkpointing": False,
            "profiler": {"enabled": False},
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        line = ["tune", "run", "--nproc_per_node", str(world), "full_finetune_distributed", "--config", str(path)]
        start("torchtune", line, tmp_path, run=False)
        alphas[name] = json.loads(out.read_text())
    check(alphas)


LOADED = """
from axolotl.integrations.base import load_plugin
load_plugin("alphaadam_dist.integrations.axolotl_plugin.AlphaAdamPlugin")
from transformers.training_args import OptimizerNames
assert OptimizerNames("alphaadam").value == "alphaadam"
"""


def test_axolotl_loads_the_plugin(tmp_path: Path) -> None:
    """Through Axolotl's own loader; from then on the Trainer takes the name. Axolotl's training is not run."""
    start("axolotl", [sys.executable, "-c", LOADED], tmp_path, run=False)
