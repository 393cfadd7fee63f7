"""`alphaadam plan`: its sizes against DeepSpeed's estimators and against what is allocated in real runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from typer.testing import CliRunner, Result

from alphaadam_dist import plan
from alphaadam_dist.cli import app
from tests.models import tiny_llama
from tests.ranks import Ranks
from tests.recipes import measured
from tests.zero import engine


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def planned(model: plan.Shapes, gpus: int, per_node: int = 8) -> dict[str, plan.Row]:
    return {row.sharding: row for row in plan.rows(model, plan.Cluster(gpus, per_node, 80, 0.4))}


@pytest.mark.parametrize(
    ("model", "parameters", "tensors"),
    [("llama-7b", 6_738_415_616, 291), ("gpt2", 124_439_808, 148), ("roberta-base", 124_697_433, 202)],
)
def test_built_in_models_have_the_published_sizes(model: str, parameters: int, tensors: int):
    sizes = plan.shapes(model)
    assert (sizes.total, sizes.tensors) == (parameters, tensors)


def test_a_local_config_is_read_and_tied_weights_count_once(tmp_path: Path):
    model = tiny_llama(tied=True)
    model.config.save_pretrained(tmp_path)
    sizes = plan.shapes(str(tmp_path))
    numels = [param.numel() for param in model.parameters()]
    assert (sizes.total, sizes.tensors, sizes.largest) == (sum(numels), len(numels), 67 * 32)
    assert sizes.block == sum(param.numel() for param in model.model.layers[0].parameters())
    assert sizes.rest == 67 * 32 + 32


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_memory_is_what_deepspeed_estimates(gpus: int):
    """Where DeepSpeed's estimate leaves out what it allocates (see below), by that much more."""
    model = plan.shapes("llama-7b")
    rows = planned(model, gpus)
    weights = 2 * model.total
    nodes = max(1, gpus // 8)
    where = {"num_gpus_per_node": min(gpus, 8), "num_nodes": nodes, "additional_buffer_factor": 1.0}
    for offload, name in ((False, ""), (True, ", CPU offload")):
        cpu, gpu = estimate_zero2_model_states_mem_needs(model.total, cpu_offload=offload, **where)
        assert rows[f"ZeRO-2{name}"].gpu == pytest.approx(gpu, abs=8)
        if offload and gpus == 1:  # beyond, it counts the model's fp32 copies while the ranks load it
            assert rows[f"ZeRO-2{name}"].node == pytest.approx(cpu + weights, abs=8)
        cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
            model.total, model.largest, cpu_offload=offload, cpu_offload_params=False, **where
        )
        assert rows[f"ZeRO-3{name}"].gpu == pytest.approx(gpu + (0 if offload else weights / gpus), abs=8)
        if offload:
            assert rows[f"ZeRO-3{name}"].node == pytest.approx(cpu + weights / nodes, abs=8)


@pytest.mark.slow
def test_memory_is_what_is_allocated(ranks2: Ranks):
    """Everything alive as the optimizer begins its step, on two ranks: to 0.1 percent."""
    numels = [param.numel() for param in measured.llama().parameters()]
    model = plan.Shapes("", sum(numels), len(numels), max(numels), block=0, rest=0)
    rows = planned(model, 2)
    weights, layer = 2 * model.total, 4 * model.largest
    # By then bf16 gradients have become fp32 ones, and no layer is gathered. Stage 2 moves gradients to the CPU through
    # a buffer of the largest parameter's size.
    gone = {"ZeRO-1": weights, "ZeRO-2": weights / 2, "ZeRO-3": layer, "ZeRO-3, CPU offload": layer,
            "ZeRO-2, CPU offload": -layer}  # fmt: skip
    for found in ranks2.run(measured.all_of_it):
        assert len(found) == 7
        for sharding, size in found.items():
            expected = rows[sharding].gpu + rows[sharding].node / 2 - gone.get(sharding, 0)
            assert size == pytest.approx(expected, rel=1e-3), sharding


@pytest.mark.slow
def test_memory_in_bf16_is_what_is_allocated(ranks2: Ranks):
    """Bytes a parameter on two ranks: 8 shared out, and at stages 1 and 2 the whole model's weights beside them."""
    numels = [param.numel() for param in measured.llama().parameters()]
    total, largest = sum(numels), max(numels)
    # By then no layer is gathered. A sub-group has up to so many elements; stage 3 copies its gradients twice at most;
    # a copy of the masters, which DeepSpeed would make, is more than that.
    copy = 2 * (measured.SUB_GROUP + largest) / 2
    assert 2 * copy < 2 * total / 2
    expected = {
        "FSDP2": (8 * total / 2, 8), "ZeRO-1": (2 * total + 8 * total / 2, 8), "ZeRO-2": (2 * total + 8 * total / 2, 8),
        "ZeRO-3": (8 * total / 2 + copy, copy), "ZeRO-3, CPU offload": (2 * 2 * total / 2 + 8 * total / 2, copy),
    }  # fmt: skip
    for found in ranks2.run(measured.in_bf16):
        for sharding, (size, within) in expected.items():
            assert found[sharding] == pytest.approx(size, abs=within + 2e-3 * size), sharding


def test_in_bf16_llama_7b_fits_on_one_gpu_of_80():
    result = run("llama-7b", "--gpus", "1", "--memory", "80", "--state-dtype", "bfloat16")
    assert result.exit_code == 0
    assert "--deepspeed_config ds_configs/llama_7b_1x80gb_bf16.json" in result.output
    assert "--deepspeed ds_configs/zero3_bf16.json" in result.output
    assert "--config_file accelerate_configs/fsdp2_bf16.yaml" in result.output
    assert run("llama-7b", "--gpus", "1", "--memory", "80", "--headroom", "0.3").exit_code == 0  # by offload only
    rows = {row.sharding: row for row in plan.rows_in_bf16(plan.shapes("llama-7b"), plan.Cluster(1, 8, 80, 0.3))}
    assert rows["ZeRO-3"].gpu / 6_738_415_616 == pytest.approx(8, rel=0.02)


def test_in_bf16_llama_7b_fits_on_two_of_24_with_offload():
    result = run("llama-7b", "--gpus", "2", "--memory", "24", "--state-dtype", "bfloat16")
    assert result.exit_code == 0
    assert "--deepspeed_config ds_configs/llama_7b_2x24gb_bf16.json" in result.output


def test_alphaadams_share_is_what_it_sends(ranks2: Ranks):
    for options, size in (({}, plan.GLOBAL_BYTES), ({"scope": "layer"}, plan.LAYER_BYTES * 5)):
        watched = {"steps": 2, "count_collectives": True}
        ours = ranks2.run(engine.given, engine.config(2), options, **watched)[0]["collectives"][1]
        adamw = ranks2.run(engine.given, engine.config(2), {}, optimizer="AdamW", **watched)[0]["collectives"][1]
        for collective in adamw:
            ours.remove(collective)
        assert ours == [("all_reduce", size)]


def test_the_recommended_command_for_llama_7b():
    result = run("llama-7b", "--gpus", "16", "--memory", "40")
    assert result.exit_code == 0
    assert "HOSTFILE=hostfile launch/deepspeed.sh train.py --deepspeed ds_configs/zero2.json" in result.output
    assert "--deepspeed_config ds_configs/llama_7b_16x40gb.json" in result.output
    assert "--config_file accelerate_configs/fsdp2_hybrid.yaml --num_processes 16" in result.output
    assert "4,656 bytes, 16 for each of 291 tensors" in result.output


def test_every_file_that_can_be_recommended_exists():
    cluster = plan.Cluster(16, 8, 80, 0.4)
    for row in plan.rows(plan.shapes("gpt2"), cluster) + plan.rows_in_bf16(plan.shapes("gpt2"), cluster):
        assert plan.config_path(row.config).is_file()


@pytest.mark.parametrize(
    ("gpus", "memory", "deepspeed", "fsdp"),
    [
        (8, 80, "ZeRO-2", "FSDP2"),
        (8, 40, "ZeRO-3", "FSDP2"),
        (16, 40, "ZeRO-2", "HSDP"),
        (16, 20, "ZeRO-3", "FSDP2"),
        (2, 40, "ZeRO-2, CPU offload", "FSDP2, CPU offload"),
        (2, 20, "ZeRO-3, CPU offload", "FSDP2, CPU offload"),
        (2, 2, None, None),
    ],
)
def test_the_choice(gpus: int, memory: float, deepspeed: str | None, fsdp: str | None):
    cluster = plan.Cluster(gpus, 8, memory, 0.4)
    rows = plan.rows(plan.shapes("llama-7b"), cluster)
    chosen = [plan.first_fit(rows, order, cluster) for order in (plan.DEEPSPEED_ORDER, plan.FSDP_ORDER)]
    assert [row and row.sharding for row in chosen] == [deepspeed, fsdp]


def test_where_nothing_fits_the_exit_code_says_so():
    result = run("llama-7b", "--gpus", "1", "--memory", "2")
    assert result.exit_code == 1
    assert "Nothing fits in 1.2 GiB a GPU" in result.output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpus", "0"], ["--gpus", "0", "1 or more"]),
        (["--gpus", "12"], ["--gpus", "12", "multiple of 8", "--per-node"]),
        (["--per-node", "0"], ["--per-node", "0", "1 or more"]),
        (["--memory", "-1"], ["--memory", "-1", "GiB of one GPU"]),
        (["--memory", "nan"], ["--memory", "nan", "GiB of one GPU"]),
        (["--memory", "inf"], ["--memory", "inf", "GiB of one GPU"]),
        (["--gpus", "8000000000"], ["--gpus", "8000000000", "1,000,000 or less"]),
        (["--headroom", "1"], ["--headroom", "1", "below 1"]),
        (["--gpu", "8"], ["--gpu", "--gpus"]),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(arguments: list[str], parts: list[str]):
    result = run("gpt2", *arguments)
    assert result.exit_code != 0
    for part in parts:
        assert part in result.output


def test_an_unknown_model_gets_a_suggestion(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("llama7b")
    assert result.exit_code == 1
    assert "MODEL is llama7b: did you mean llama-7b?" in result.output


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "held",
    [
        json.dumps(CONFIG)[:-9],
        "[1, 2]",
        "5",
        json.dumps(CONFIG | {"hidden_size": "eight"}),
        json.dumps(CONFIG | {"num_attention_heads": 0}),
        json.dumps(CONFIG | {"vocab_size": -1}),
        json.dumps(CONFIG | {"model_type": ["llama"]}),
    ],
)
def test_a_config_of_another_shape_is_named(tmp_path: Path, held: str):
    (tmp_path / "config.json").write_text(held)
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert re.search(rf"^Error: MODEL is {tmp_path}: .*config", result.output, re.MULTILINE), result.output


def test_help_shows_an_example():
    assert "alphaadam plan llama-7b --gpus 16 --memory 40" in run("--help").output
