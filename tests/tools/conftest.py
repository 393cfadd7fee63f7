"""A tiny Llama with a tokenizer, examples in the tools' formats, and a way to run a tool from its own folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphaadam_dist.training.start_ranks import free_port

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".tools"
STEPS = 5
TIMEOUT = 900.0
RUN = [str(Path(sys.executable).with_name("alphaadam")), "run", "--"]
WORDS = "the gardener waters roses before noon and counts seven red bees near an old stone wall".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def examples() -> list[tuple[str, str]]:
    """Questions and answers with something to learn in them."""
    pairs = [(WORDS[i % 16], WORDS[(3 * i + 1) % 16]) for i in range(64)]
    return [(f"{a} {b} and", f"{b} {a} near the {a} wall") for a, b in pairs]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, examples: list[tuple[str, str]]) -> Path:
    """A folder that any tool can load a model and its tokenizer from."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [" ".join(pair) for pair in examples]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def zero2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DeepSpeed config that names AlphaAdam, as a person would write it."""
    file = tmp_path_factory.mktemp("zero") / "zero2.json"
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    file.write_text(json.dumps({
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "zero_optimization": {"stage": 2},
        "optimizer": {"type": "alphaadam", "params": {**auto, "no_decay": ["norm"]}},
    }))  # fmt: skip
    return str(file)


@pytest.fixture(scope="session")
def zero2_bare(zero2: str) -> str:
    """The same without an optimizer."""
    file = Path(zero2).with_name("bare.json")
    file.write_text(json.dumps({k: v for k, v in json.loads(Path(zero2).read_text()).items() if k != "optimizer"}))
    return str(file)


def start(tool: str, line: list[str], cwd: Path, *, run: bool = True, **variables: str) -> None:
    """Run a command with a tool's folder laid over the environment, under `alphaadam run` or without.

    Skips where `make test-tools` has not made the folder. Fails with the end of the output where the command fails.
    """
    folder = TOOLS / tool
    if not (folder / ".installed").exists():
        pytest.skip(f"{tool} is not installed: make test-tools")
    paths = os.pathsep.join([str(folder), str(ROOT), str(Path(__file__).parent)])
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    environment = {
        **clean, "PYTHONPATH": paths, "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_PORT": str(free_port()),
        **variables,
    }  # fmt: skip
    done = subprocess.run(
        [*(RUN if run else []), *line],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]


def logged(out: Path) -> list[float]:
    """alpha after each step, from the state that HF's Trainer saves."""
    (state,) = [*out.glob("trainer_state.json"), *out.glob(f"**/checkpoint-{STEPS}/trainer_state.json")][:1]
    return [entry["alpha"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def check(alphas: dict[str, list[float]], within: float = 1e-3) -> None:
    """Every sharding has plain DDP's alpha, to what other orders of adding do to a gradient; and it has moved."""
    expected = alphas.pop("ddp")
    assert len(expected) == STEPS
    assert expected[-1] > 1.2, "alpha never moved: the test would show nothing"
    for name, others in alphas.items():
        assert others == pytest.approx(expected, abs=within), name
