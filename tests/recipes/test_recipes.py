"""The recipes in `launch/` with tiny models: through a real launcher once, and on a pool of ranks."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from alphaadam_dist.training import callbacks, checkpoints, metrics
from alphaadam_dist.training.corpus import Corpus
from alphaadam_dist.training.data import byte_level_bpe
from alphaadam_dist.training.start_ranks import free_port
from tests.hf import trainer
from tests.marks import nightly_but
from tests.ranks import Ranks

ROOT = Path(__file__).parents[2]
ALONE = {"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None}
PLAIN = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
SMALL = ["--batch", "2", "--steps", "4", "--lr", "1e-2"]


def start(recipe: str, arguments: list[str], cache: str) -> tuple[int, str]:
    """Run a recipe on this rank: its exit code and what it printed."""
    with trainer.clean():
        os.environ |= {**PLAIN, "ALPHAADAM_CACHE": cache}
        app = importlib.import_module(f"launch.{recipe}").app
        result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def start_and_stop(recipe: str, arguments: list[str], cache: str) -> tuple[int, str]:
    """`start`, and SIGTERM to rank 1 in step 3."""

    class Told(callbacks.SaveAndStop):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if args.process_index == 1 and state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().on_step_end(args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "SaveAndStop", Told)
        return start(recipe, arguments, cache)


def on_ranks(ranks: Ranks, recipe: str, arguments: list[str], cache: Path) -> str:
    """Run a recipe on all ranks; what the first printed."""
    answers = ranks.run(start, recipe, arguments, str(cache))
    assert [code for code, _ in answers] == [0] * ranks.world, answers
    return str(answers[0][1])


@pytest.fixture
def garden(tmp_path: Path, cache: Path) -> list[str]:
    """A tiny Llama with a tokenizer of its own, and a few of the garden questions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    lines = (ROOT / "launch/data/garden/train.jsonl").read_text().splitlines()
    texts = Dataset.from_dict({"text": lines})
    tokenizer = byte_level_bpe(Corpus(texts, texts, "garden"), 400)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    for part in (tokenizer, LlamaForCausalLM(config)):
        part.save_pretrained(tmp_path / "llama")
    for name, part in (("train", lines[:40]), ("held_out", lines[40:48])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    data = ["--data", str(tmp_path / "train.jsonl"), "--held-out", str(tmp_path / "held_out.jsonl"), "--block", "160"]
    return ["--model", str(tmp_path / "llama"), *data, *SMALL, "--out", str(tmp_path / "run")]


def _logged(folder: Path, measure: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[measure]) for entry in metrics.read(folder / metrics.FILE_NAME) if measure in entry]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_llama_from_the_launcher_to_the_comparison(ranks2: Ranks, garden: list[str], cache: Path, tmp_path: Path):
    """DeepSpeed's launcher trains with AlphaAdam at ZeRO-2 in bf16; AdamW, started later, is shown beside it."""
    arguments = [*garden, "--deepspeed", str(ROOT / "ds_configs/zero2.json"), "--bf16", "--gradient-checkpointing"]
    variables = {"GPUS": "2", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launched = subprocess.run(
        ["launch/deepspeed.sh", "launch/finetune_llama.py", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT), **PLAIN, **variables},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-5000:]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{variables['MASTER_PORT']}_*")), "66 MiB a rank would stay"
    more = "--optimizer lookahead or adamw puts look-ahead or AdamW beside it"
    for phrase in ("AlphaAdam", "before", "held-out loss", more, "losses.png"):
        assert phrase in launched.stdout
    ours = tmp_path / "run" / "alphaadam"
    losses = _logged(ours, "eval_loss")
    assert [step for step, _ in losses] == [0, 1, 2, 3, 4]
    assert losses[-1][1] < losses[0][1]
    assert all(alpha > 1 for _, alpha in _logged(ours, "alpha")[2:])
    answers = json.loads((ours / "answers.json").read_text())
    assert answers["questions"][0] == json.loads((tmp_path / "held_out.jsonl").read_text().splitlines()[0])["prompt"]
    assert len(answers["before"]) == len(answers["after"]) == 3

    said = on_ranks(ranks2, "finetune_llama", [*arguments, "--optimizer", "adamw"], cache)
    assert re.search(r"(AlphaAdam|AdamW) ends \S+ below (AlphaAdam|AdamW) on held-out text", said)
    baseline = _logged(tmp_path / "run" / "adamw", "eval_loss")
    assert baseline[0] == losses[0], "both start from the same model"
    assert baseline[-1] != losses[-1]
    assert _logged(tmp_path / "run" / "adamw", "alpha") == []

    # What has finished is shown, not trained again; other settings are not compared.
    assert on_ranks(ranks2, "finetune_llama", [*arguments, "--resume"], cache).count("held-out loss") == 1
    code, error = start("finetune_llama", [*arguments, "--resume", "--block", "99"], str(cache))
    assert code == 1
    assert "--block is 99, but the run in" in error


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lora_trains_adapters_only(ranks2: Ranks, garden: list[str], cache: Path, tmp_path: Path):
    """At ZeRO-3: the checkpoint has adapters and nothing of the base, and the loss falls through them alone."""
    from safetensors.torch import load_file

    on_ranks(ranks2, "finetune_llama", [*garden, "--lora", "4", "--deepspeed", f"{ROOT}/ds_configs/zero3.json"], cache)
    folder = tmp_path / "run" / "alphaadam"
    saved = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * 2  # A and B, of seven linear layers, in two blocks
    assert all("lora_" in name for name in saved)
    assert all(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name), "B starts at zero"
    losses = _logged(folder, "eval_loss")
    assert losses[-1][1] < losses[0][1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpt2_from_scratch_is_stopped_and_resumes(ranks2: Ranks, cache: Path, tmp_path: Path):
    """Under FSDP2 on the package's own source: the model has the shape asked for, and goes on from a checkpoint."""
    shape = ["--layers", "2", "--hidden", "32", "--heads", "2", "--block", "32", "--vocabulary", "300"]
    arguments = [*shape, *SMALL, "--data", str(ROOT / "alphaadam_dist"), "--fsdp", "--save-every", "2"]
    arguments += ["--out", str(tmp_path)]
    on_ranks(ranks2, "pretrain_gpt2", arguments, cache)
    folder = tmp_path / "alphaadam"
    config = json.loads((folder / "checkpoint-4" / "config.json").read_text())
    assert {key: config[key] for key in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")} == {
        "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 300,
    }  # fmt: skip
    whole = _logged(folder, "loss")
    assert len(whole) == 4

    # a rank that is told to stop takes the other along; what they had come to is saved
    folder = tmp_path / "stopped" / "alphaadam"
    arguments[-1] = str(folder.parent)
    answers = ranks2.run(start_and_stop, "pretrain_gpt2", arguments, str(cache))
    assert [code for code, _ in answers] == [143, 143]
    assert "Stopped by SIGTERM: saved. The same command with --resume goes on" in answers[0][1]
    assert checkpoints.step_of(checkpoints.last_complete(folder)) == 3
    assert _logged(folder, "loss") == whole[:3]

    on_ranks(ranks2, "pretrain_gpt2", [*arguments, "--resume"], cache)
    assert _logged(folder, "loss") == whole
    assert [step for step, _ in _logged(folder, "eval_loss")] == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_glue_learns_a_local_task(ranks2: Ranks, cache: Path, tmp_path: Path):
    """Under DDP: a tiny encoder learns which of two words a sentence has, and is scored with the task's metrics."""
    from transformers import BertConfig, BertForMaskedLM

    words = ["bad", "good", "the", "spade", "is", "hose", "very", "rake"]
    texts = Dataset.from_dict({"text": [" ".join(words)] * 9})
    tokenizer = byte_level_bpe(Corpus(texts, texts, "words"), 300)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    for part in (tokenizer, BertForMaskedLM(config)):
        part.save_pretrained(tmp_path / "bert")
    rows = [f"the {thing} is {very}{word}\t{i}" for i, word in enumerate(words[:2]) for thing in words[3::2]
            for very in ("", "very ", "very very ")]  # fmt: skip
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    files = ["--data", str(tmp_path / "rows.tsv"), "--held-out", str(tmp_path / "rows.tsv")]
    arguments = [
        "--model",
        str(tmp_path / "bert"),
        "--task",
        "sst2",
        *files,
        "--batch",
        "3",
        "--accumulate",
        "2",
        "--steps",
        "25",
    ]
    said = on_ranks(ranks2, "finetune_glue", [*arguments, "--lr", "1e-2", "--out", str(tmp_path / "run")], cache)
    assert re.search(r"accuracy before +accuracy\n", said)
    scores = _logged(tmp_path / "run" / "alphaadam", "eval_accuracy")
    assert scores[0][1] < 0.8
    assert scores[-1] == (25, 1.0)
    # Two labels and weights that know nothing: ln 2, on any number of ranks and batches.
    for measure in ("eval_loss", "loss"):
        assert _logged(tmp_path / "run" / "alphaadam", measure)[0][1] == pytest.approx(math.log(2), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 9}, "Input should be 0, 1, 2, 3"),
        ({"stage": 2, "offload_optimiser": {}}, "Extra inputs are not permitted"),
        ([2], "'list' object has no attribute 'get'"),
    ],
)
def test_a_config_that_deepspeed_does_not_take_is_named(
    ranks2: Ranks, cache: Path, tmp_path: Path, zero: Any, said: str
):
    config = tmp_path / "config.json"
    micro = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    config.write_text(json.dumps({**micro, "zero_optimization": zero}))
    shape = ["--layers", "1", "--hidden", "16", "--heads", "1", "--block", "32", "--vocabulary", "300"]
    arguments = [*shape, *SMALL, "--data", str(ROOT / "alphaadam_dist" / "verify"), "--out", str(tmp_path / "run")]
    answers = ranks2.run(start, "pretrain_gpt2", [*arguments, "--deepspeed", str(config)], str(cache))
    for code, output in answers:
        assert code == 1
        last = output.strip().splitlines()[-1]
        assert last.startswith(f"Error: --deepspeed {config}: ")
        assert said in last


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", nightly_but(["fsdp", "plain", "zero3"], every=3))
def test_llama_in_bf16_without_masters(ranks2: Ranks, garden: list[str], cache: Path, tmp_path: Path, how: str):
    """Weights and moments are bf16 at the end, and the loss falls."""
    sharding = {"plain": [], "fsdp": ["--fsdp"], "zero3": ["--deepspeed", f"{ROOT}/ds_configs/zero3.json"]}[how]
    in_bf16 = ["--state-dtype", "bfloat16", "--bf16-parameters"]
    on_ranks(ranks2, "finetune_llama", [*garden, *in_bf16, *sharding], cache)
    folder = tmp_path / "run" / "alphaadam"
    losses = _logged(folder, "eval_loss")
    assert losses[-1][1] < losses[0][1]
    if how == "plain":
        held = torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)
        assert {state["exp_avg"].dtype for state in held["state"].values()} == {torch.bfloat16}
        assert held["param_groups"][0]["alphaadam_rounding"] == [1, 3], "the first of 4 steps warms up at a rate of 0"
    from safetensors.torch import load_file

    weights = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def _saved_groups(folder: Path) -> list[tuple[float, float, float]]:
    """Of each parameter group in the last checkpoint: the rate at its peak, lr_scale and decay."""
    checkpoint = folder / "checkpoint-4"
    if (checkpoint / "optimizer.pt").exists():
        held = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    else:
        (path,) = checkpoint.glob("global_step4/*zero_pp_rank_0_mp_rank_00_optim_states.pt")
        held = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    return [(g["initial_lr"], g.get("lr_scale", 1.0), g["weight_decay"]) for g in held["param_groups"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", nightly_but(["zero2", "plain", "fsdp"], every=3))
def test_groups_by_name_for_both_optimizers(ranks2: Ranks, cache: Path, tmp_path: Path, how: str):
    """AdamW gets lr * lr_scale. Where everything has the same rate again, the losses are others."""
    sharding = {"plain": [], "fsdp": ["--fsdp"], "zero2": ["--deepspeed", f"{ROOT}/ds_configs/zero2.json"]}[how]
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps([{"match": "wte", "lr_scale": 4.0}, {"match": "ln_", "weight_decay": 0.0}]))
    shape = ["--layers", "1", "--hidden", "16", "--heads", "1", "--block", "32", "--vocabulary", "300"]
    same = [*shape, *SMALL, *sharding, "--data", str(ROOT / "alphaadam_dist" / "verify")]
    for optimizer in ("alphaadam", "adamw"):
        both = [*same, "--optimizer", optimizer]
        on_ranks(ranks2, "pretrain_gpt2", [*both, "--groups", str(groups), "--out", str(tmp_path / "run")], cache)
        if how != "fsdp":
            rate, scale = (1e-2, 4.0) if optimizer == "alphaadam" else (4e-2, 1.0)
            expected = [(1e-2, 1.0, 0.1), (rate, scale, 0.1), (1e-2, 1.0, 0.0)]
            assert _saved_groups(tmp_path / "run" / optimizer) == expected
    on_ranks(ranks2, "pretrain_gpt2", [*same, "--out", str(tmp_path / "plain")], cache)
    losses = [
        _logged(folder, "eval_loss")[-1][1] for folder in (tmp_path / "run/alphaadam", tmp_path / "plain/alphaadam")
    ]
    assert abs(losses[0] - losses[1]) > 1e-2


def _refused(recipe: str, *arguments: str) -> str:
    app = importlib.import_module(f"launch.{recipe}").app
    result = CliRunner().invoke(app, arguments, env={**PLAIN, **ALONE})
    assert result.exit_code != 0
    return result.output


@pytest.mark.parametrize(
    ("recipe", "arguments", "parts"),
    [
        ("finetune_llama", ["--optimiser", "adamw"], ["--optimiser", "--optimizer"]),
        ("finetune_llama", ["--optimizer", "adam"], ["adam", "alphaadam", "lookahead", "adamw"]),
        ("finetune_llama", ["--fsdp", "--deepspeed", "ds_configs/zero2.json"], ["--fsdp", "give one"]),
        ("finetune_llama", ["--deepspeed", "nowhere.json"], ["--deepspeed is nowhere.json", "ds_configs/"]),
        ("finetune_llama", ["--model", "./nowhere"], ["--model is ./nowhere", "no such file"]),
        ("finetune_llama", ["--held-out", "no/such/file.jsonl"], ["--held-out is no/such/file.jsonl"]),
        ("finetune_llama", ["--bf16-parameters"], ["--bf16-parameters without --state-dtype bfloat16"]),
        ("finetune_llama", ["--state-dtype", "float16"], ["--state-dtype", "bfloat16"]),
        ("finetune_llama", ["--lora", "0"], ["--lora is 0", "1 or more"]),
        ("pretrain_gpt2", ["--hidden", "30", "--heads", "4"], ["--hidden is 30", "--heads 4"]),
        ("pretrain_gpt2", ["--groups", "nowhere.json"], ["--groups is nowhere.json", "no such file", '"match"']),
        ("pretrain_gpt2", ["--groups", __file__], ["test_recipes.py is cut short or no JSON", "write a list there"]),
        ("pretrain_gpt2", ["--lr", "0"], ["--lr is 0", "above 0"]),
        ("pretrain_gpt2", ["--lr", "inf"], ["--lr is inf", "finite"]),
        ("pretrain_gpt2", ["--weight-decay", "nan"], ["--weight-decay is nan", "0 or more"]),
        ("pretrain_gpt2", ["--epochs", "1e300"], ["--epochs is 1e+300", "or less"]),
        ("pretrain_gpt2", ["--layers", "100000000000"], ["--layers is 100000000000", "10,000,000 or less"]),
        ("pretrain_gpt2", ["--tokenizer", "./nowhere"], ["--tokenizer is ./nowhere", "no such file"]),
        ("pretrain_gpt2", ["--save-every", "0"], ["--save-every is 0", "1 or more"]),
        ("finetune_glue", ["--length", "100000000000"], ["--length is 100000000000", "10,000,000 or less"]),
        ("finetune_glue", ["--out", __file__], [f"--out {__file__} cannot be used"]),
        ("finetune_glue", ["--task", "sst"], ["sst", "sst2"]),
    ],
)
def test_a_wrong_option_is_named_with_its_fix(recipe: str, arguments: list[str], parts: list[str]):
    said = _refused(recipe, *arguments)
    for part in parts:
        assert part in said


@pytest.mark.parametrize("recipe", ["finetune_llama", "pretrain_gpt2", "finetune_glue"])
def test_help_has_an_example_under_each_kind_of_launcher(recipe: str):
    app = importlib.import_module(f"launch.{recipe}").app
    said = CliRunner().invoke(app, ["--help"], env=PLAIN).output
    for line in (f"launch/deepspeed.sh launch/{recipe}.py --deepspeed", f"launch/torchrun.sh launch/{recipe}.py"):
        assert line in said
    assert "local_rank" not in said
