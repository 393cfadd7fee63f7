"""`alphaadam plan`: its sizes against DeepSpeed's estimators and against what is allocated in real runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from typer.testing import CliRunner, Result

from alphaadam_dist import plan
from alphaadam_dist.cli import app
from alphaadam_dist.plan_models import BUILT_IN, FOUR_BITS
from tests.models import tiny_llama
from tests.ranks import Ranks
from tests.recipes import measured
from tests.zero import engine


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def planned(model: plan.Shapes, gpus: int, per_node: int = 8) -> dict[str, plan.Row]:
    return {row.sharding: row for row in plan.rows(model, plan.Cluster(gpus, per_node, 80, 0.4))}


PUBLISHED = {
    "llama-7b": 6_738_415_616, "llama-3-1b": 1_235_814_400, "llama-3-3b": 3_212_749_824, "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496, "mistral-7b": 7_241_732_096, "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200, "qwen2.5-7b": 7_615_616_512, "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "gpt2": 124_439_808, "roberta-base": 124_697_433,
}  # fmt: skip
"""Parameters that the models' pages on the hub give."""


@pytest.mark.slow
def test_every_built_in_model_has_its_published_size():
    assert {name: plan.shapes(name).total for name in BUILT_IN} == PUBLISHED


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


@pytest.fixture
def small(tmp_path: Path) -> str:
    """The folder of the Llama that is measured."""
    measured.llama().config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.slow
def test_memory_under_adapters_is_what_is_allocated(ranks2: Ranks, small: str):
    model = plan.shapes(small, adapters=8)
    adapted = list(measured.with_adapters().parameters())
    assert model.total == sum(param.numel() for param in adapted)
    assert (model.trained, model.tensors) == (
        sum(param.numel() for param in adapted if param.requires_grad), sum(param.requires_grad for param in adapted)
    )  # fmt: skip
    rows = planned(model, 2)
    weights, layer = 2 * model.trained, 2 * model.largest
    gone = {"ZeRO-1": weights, "ZeRO-2": weights / 2, "ZeRO-3": layer, "ZeRO-3, CPU offload": layer}
    for found in ranks2.run(measured.all_of_it, adapters=True):
        assert len(found) == 6
        for sharding, size in found.items():
            expected = rows[sharding].gpu + rows[sharding].node / 2 - gone.get(sharding, 0)
            assert size == pytest.approx(expected, rel=2e-2), sharding  # buffers are no longer small beside it


def test_four_bits_are_counted_on_the_linear_layers_and_partitioned_nowhere(small: str):
    lora, qlora = plan.shapes(small, adapters=8), plan.shapes(small, adapters=8, four_bit=True)
    linear = 2 * (4 * 128 * 128 + 3 * 128 * 352)
    assert lora.frozen_bytes - qlora.frozen_bytes == (2 - FOUR_BITS) * linear
    assert lora.frozen_bytes == 2 * lora.frozen
    assert [row.sharding for row in plan.rows(qlora, plan.Cluster(2, 8, 80, 0.4))] == [
        "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-2, CPU offload",
    ]  # fmt: skip
    whole = planned(lora, 2)["ZeRO-2"].gpu - planned(qlora, 2)["ZeRO-2"].gpu
    assert whole == lora.frozen_bytes - qlora.frozen_bytes


def test_lora_and_qlora_on_the_command_line(small: str):
    for option, kind in (("--lora", "LoRA"), ("--qlora", "QLoRA")):
        result = run(small, option, "8", "--gpus", "2", "--memory", "1")
        assert result.exit_code == 0, result.output
        assert f"under {kind} of rank 8" in result.output
        assert ("are not partitioned here" in result.output) == (kind == "QLoRA")


def test_forty_columns_are_enough(small: str):
    options = ["plan", small, "--gpus", "8", "--memory", "1"]
    result = CliRunner().invoke(app, options, env={"COLUMNS": "40", "NO_COLOR": "1", "TERM": "dumb"})
    lines = result.output.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("sharding")) :]
    table = table[: next(i for i, line in enumerate(table) if "GiB on each" in line)]
    assert all(len(line) <= 40 for line in table)
    assert "…" not in result.output
    assert (
        sum(
            line.startswith("ZeRO-3, NVMe offload ") and line.rstrip().endswith(("fits", "large", "this"))
            for line in table
        )
        == 1
    )


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


def test_with_the_step_in_backward_llama_7b_has_six_bytes_a_parameter():
    options = ["--gpus", "1", "--memory", "48", "--state-dtype", "bfloat16", "--headroom", "0.15"]
    assert "accelerate_configs" not in run("llama-7b", *options).output, "only by offload, under ZeRO-3"
    result = run("llama-7b", *options, "--step-in-backward")
    assert result.exit_code == 0
    assert "--config_file accelerate_configs/fsdp2_bf16.yaml" in result.output
    assert "ZeRO" not in result.output, "not served"
    sizes, cluster = plan.shapes("llama-7b"), plan.Cluster(1, 8, 48, 0.15)
    (row,) = plan.in_backward(plan.rows_in_bf16(sizes, cluster), sizes, cluster, "bfloat16")
    assert 6 < row.gpu / 6_738_415_616 < 6.4, "and the modules at work, as without it"


def test_with_the_step_in_backward_every_fsdp_is_smaller_by_the_gradients():
    sizes, cluster = plan.shapes("llama-7b"), plan.Cluster(16, 8, 80, 0.4)
    kept = {row.sharding: row for row in plan.rows(sizes, cluster)}
    freed = {row.sharding: row for row in plan.in_backward(list(kept.values()), sizes, cluster, None)}
    assert set(freed) == {"HSDP", "FSDP2", "FSDP2, CPU offload"}
    for sharding, ranks in (("HSDP", 8), ("FSDP2", 16)):
        assert kept[sharding].gpu - freed[sharding].gpu == pytest.approx(4 * 6.74e9 / ranks, rel=0.05)
    assert kept["FSDP2, CPU offload"] == freed["FSDP2, CPU offload"]


def test_in_bf16_llama_7b_fits_on_two_of_24_with_offload():
    result = run("llama-7b", "--gpus", "2", "--memory", "24", "--state-dtype", "bfloat16")
    assert result.exit_code == 0
    assert "--deepspeed_config ds_configs/llama_7b_2x24gb_bf16.json" in result.output


@pytest.mark.slow
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
    start = "deepspeed --hostfile hostfile --no_local_rank train.py"
    assert f"{start} --deepspeed ds_configs/zero2.json" in result.output
    assert "--deepspeed_config ds_configs/llama_7b_16x40gb.json" in result.output
    assert "--config_file accelerate_configs/fsdp2_hybrid.yaml --num_processes 16" in result.output
    assert "4,656 bytes, 16 for each of 291 tensors" in result.output


def test_in_a_wheel_the_commands_name_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The configs lie in the package there, and nothing of launch/ does."""
    package = tmp_path / "site-packages" / "alphaadam_dist"
    shutil.copytree(Path(plan.__file__).parents[1] / "ds_configs", package / "ds_configs")
    shutil.copytree(Path(plan.__file__).parents[1] / "accelerate_configs", package / "accelerate_configs")
    monkeypatch.setattr("alphaadam_dist.paths.__file__", str(package / "paths.py"))
    for arguments in (["--gpus", "16", "--memory", "40"], ["--gpus", "8"], ["--gpus", "2", "--memory", "40"]):
        output = run("llama-7b", *arguments).output
        assert "launch/" not in output
        named = re.findall(r"(?:--deepspeed|--deepspeed_config|--config_file) (\S+)", output)
        assert len(named) >= 2
        assert all(Path(name).is_file() and package in Path(name).parents for name in named), named


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
        (["--lora", "0"], ["--lora", "0", "from 1 to"]),
        (["--lora", "8", "--qlora", "8"], ["--lora 8", "--qlora 8", "one of them"]),
        (["--qlora", "8", "--step-in-backward"], ["--qlora 8", "--step-in-backward", "leave"]),
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
