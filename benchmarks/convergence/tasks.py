"""The training tasks, at two scales: small for two cores, large for a GPU. Models are transformers' own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from sysconfig import get_path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alphaadam_dist.paths import cache_dir
from alphaadam_dist.training.corpus import load_corpus
from alphaadam_dist.training.data import byte_level_bpe, token_blocks
from alphaadam_dist.training.transformers_versions import in_dtype

from .trial import Task, Trial

BYTES = 257  # with the end of text: a BPE of this size has no merges
HELD_OUT = 128
CLIP = 1.0
PACKAGES = ("asyncio", "ctypes", "distutils", "email", "multiprocessing", "tkinter", "unittest", "xml")


@dataclass(frozen=True)
class Scale:
    """How large models and runs are. ``pretrained``: what is fine-tuned; None trains a small Llama for it first."""

    width: int
    layers: int
    heads: int
    block: int
    batch: int
    steps: int
    vocabulary: int
    rates: tuple[float, ...]
    fine_tuning_rates: tuple[float, ...]
    data: str = "stdlib"
    pretrained: str | None = None
    device: str = "cpu"

    @property
    def init(self) -> float:
        """Standard deviation of new weights: GPT-2's 0.02 at width 768, and as much per unit at any other width."""
        return 0.02 * (768 / self.width) ** 0.5


SMALL = Scale(
    64, 2, 4, block=64, batch=8, steps=128, vocabulary=512,
    rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), fine_tuning_rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
)  # fmt: skip
LARGE = Scale(
    768, 12, 12, block=512, batch=16, steps=4000, vocabulary=32000,
    rates=(1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3), fine_tuning_rates=(1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4),
    pretrained="HuggingFaceTB/SmolLM2-135M", device="cuda",
)  # fmt: skip


def tasks(scale: Scale) -> tuple[Task, ...]:
    """The four training tasks at this scale."""
    token, label = "held-out loss, nats a token", "held-out loss, nats a label"
    fine_tuned = "a small Llama" if scale.pretrained is None else scale.pretrained
    bind = functools.partial
    return (
        Task("gpt", "GPT from scratch, bytes", token, scale.steps, scale.rates, bind(gpt, scale), CLIP),
        Task("llama", "Llama from scratch, BPE", token, scale.steps, scale.rates, bind(llama, scale), CLIP),
        Task(
            "finetune", f"{fine_tuned}, code to prose", token,
            scale.steps // 2, scale.fine_tuning_rates, bind(finetune, scale), CLIP,
        ),
        Task("encoder", "encoder, 8 classes", label, scale.steps * 3 // 4, scale.rates, bind(encoder, scale), CLIP),
    )  # fmt: skip


# ---- the tasks ----------------------------------------------------------------------------------------------------


def gpt(scale: Scale, seed: int) -> Trial:
    """GPT-2's architecture on the bytes of the corpus, embeddings tied."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=BYTES, n_positions=scale.block, n_embd=scale.width, n_layer=scale.layers, n_head=scale.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, initializer_range=scale.init,
    )  # fmt: skip
    train, held_out = blocks(scale.data, bpe(scale.data, BYTES), scale.block)
    return language(scale, GPT2LMHeadModel(config), train, held_out, seed)


def llama(scale: Scale, seed: int) -> Trial:
    """Llama's architecture on a byte-level BPE of the corpus, embeddings not tied."""
    torch.manual_seed(seed)
    train, held_out = blocks(scale.data, bpe(scale.data, scale.vocabulary), scale.block)
    return language(scale, new_llama(scale), train, held_out, seed)


def finetune(scale: Scale, seed: int) -> Trial:
    """A language model of code goes on with prose: Python's manual, which the corpus leaves out."""
    if scale.pretrained is not None:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(scale.pretrained)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(scale.pretrained, **in_dtype(torch.float32))
    else:
        tokenizer = bpe(scale.data, scale.vocabulary)
        model = new_llama(scale)
        model.load_state_dict(torch.load(pretrain(scale), weights_only=True))
    train, held_out = blocks(manual(), tokenizer, scale.block)
    return language(scale, model, train, held_out, seed)


def encoder(scale: Scale, seed: int) -> Trial:
    """ModernBERT's architecture learns which of eight packages of the standard library a piece of text is from."""
    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=scale.vocabulary, hidden_size=scale.width, intermediate_size=scale.width * 3 // 2,
        num_hidden_layers=scale.layers, num_attention_heads=scale.heads, max_position_embeddings=scale.block,
        classifier_pooling="mean", initializer_range=scale.init,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0,
    )  # fmt: skip
    config.num_labels = len(PACKAGES)
    model = ModernBertForSequenceClassification(config)
    inputs, labels = package_pieces(scale)
    held_out, train = (inputs[: 4 * HELD_OUT], labels[: 4 * HELD_OUT]), (inputs[4 * HELD_OUT :], labels[4 * HELD_OUT :])

    def loss(tokens: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=tokens.to(scale.device)).logits, label.to(scale.device))

    return trial(scale, model, loss, train, held_out, 2 * scale.batch, seed)


# ---- models -------------------------------------------------------------------------------------------------------


def new_llama(scale: Scale) -> LlamaForCausalLM:
    """A Llama with random weights from torch's current seed."""
    config = LlamaConfig(
        vocab_size=scale.vocabulary, hidden_size=scale.width, intermediate_size=scale.width * 5 // 2,
        num_hidden_layers=scale.layers, num_attention_heads=scale.heads, max_position_embeddings=scale.block,
        tie_word_embeddings=False, initializer_range=scale.init,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pretrain(scale: Scale) -> Path:
    """The weights that fine-tuning starts from: AdamW for three times a run's steps, kept in the cache folder."""
    what = hashlib.sha256(repr((scale, corpus_named(scale.data).digest)).encode() + Path(__file__).read_bytes())
    path = cache_dir() / f"convergence-llama-{what.hexdigest()[:16]}.pt"
    if not path.exists():
        torch.manual_seed(1000)
        model = new_llama(scale)
        train, held_out = blocks(scale.data, bpe(scale.data, scale.vocabulary), scale.block)
        start = language(scale, model, train, held_out, seed=1000)
        optimizer = torch.optim.AdamW(model.parameters(), lr=scale.rates[1])
        for step in range(3 * scale.steps):
            start.loss(step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        partial = path.with_suffix(f".partial{os.getpid()}")
        torch.save(model.state_dict(), partial)
        os.replace(partial, path)
    return path


def language(scale: Scale, model: PreTrainedModel, train: Tensor, held_out: Tensor, seed: int) -> Trial:
    """A trial of next-token prediction; blocks of shape (n, block)."""

    def loss(tokens: Tensor) -> Tensor:
        tokens = tokens.to(scale.device)
        logits = model(input_ids=tokens).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    return trial(scale, model, loss, (train,), (held_out,), scale.batch, seed)


def trial(
    scale: Scale,
    model: PreTrainedModel,
    loss: Callable[..., Tensor],
    train: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    batch: int,
    seed: int,
) -> Trial:
    """Batches drawn with ``seed``; the held-out loss is a mean over all of ``held_out``."""
    nn.Module.to(model, scale.device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train[0]), generator=generator)

    def step_loss(step: int) -> Tensor:
        # the order starts anew where a long run has seen everything
        rows = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        return loss(*(part[rows] for part in train))

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        size = 4 * batch
        total = sum(
            float(loss(*(part[i : i + size] for part in held_out))) * len(held_out[0][i : i + size])
            for i in range(0, len(held_out[0]), size)
        )
        model.train()
        return total / len(held_out[0])

    embedding = [p for p in model.get_input_embeddings().parameters() if p.requires_grad]
    inside = {id(p) for p in embedding}
    other: list[nn.Parameter] = [p for p in model.parameters() if id(p) not in inside]
    return Trial(other, step_loss, evaluate, embedding=embedding)


# ---- data, loaded once a process ----------------------------------------------------------------------------------

corpus_named = functools.cache(load_corpus)


@functools.cache
def blocks(data: str, tokenizer: PreTrainedTokenizerBase, block: int) -> tuple[Tensor, Tensor]:
    """Training and held-out blocks of tokens, each int64 of shape (n, block)."""
    train, held_out = token_blocks(corpus_named(data), tokenizer, block)
    return train.with_format("torch")["input_ids"][:], held_out.with_format("torch")["input_ids"][:]


@functools.cache
def bpe(data: str, vocabulary: int) -> PreTrainedTokenizerBase:
    return byte_level_bpe(corpus_named(data), vocabulary)


@functools.cache
def manual() -> str:
    """A folder with Python's manual, one file a topic, in the cache.

    It appears whole: workers start together, and one that read what another was still writing would train on less.
    """
    folder = cache_dir() / f"manual-{hashlib.sha256(repr(topics).encode()).hexdigest()[:16]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as partial:
            (whole := Path(partial, "manual")).mkdir()
            for topic, text in topics.items():
                (whole / f"{topic}.txt").write_text(text)
            with contextlib.suppress(OSError):  # where another worker was first
                whole.rename(folder)
    return str(folder)


@functools.cache
def package_pieces(scale: Scale) -> tuple[Tensor, Tensor]:
    """Pieces of half a block from eight packages, shuffled: tokens of shape (n, block / 2) and labels of shape (n)."""
    tokenizer = bpe(scale.data, scale.vocabulary)
    pieces, labels = [], []
    for label, package in enumerate(PACKAGES):
        corpus = corpus_named(str(Path(get_path("stdlib")) / package))
        train, _ = token_blocks(corpus, tokenizer, scale.block // 2)
        pieces.append(train.with_format("torch")["input_ids"][:])
        labels.append(torch.full((len(train),), label))
    order = torch.randperm(sum(map(len, pieces)), generator=torch.Generator().manual_seed(0))
    return torch.cat(pieces)[order], torch.cat(labels)[order]
