"""The training tasks, at two scales: small for two cores, large for a GPU. Models are transformers' own."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
)

from alphaadam_dist.paths import cache_dir
from alphaadam_dist.training.models import pretrained_model, pretrained_tokenizer
from alphaadam_dist.training.transformers_versions import in_dtype

from . import source, text
from . import trial as trial_module
from .text import Data
from .trial import Task, Trial, warmup_and_cosine

BYTES = 257  # with the end of text: a BPE of this size has no merges
CLIP = 1.0
FINISHED = 8
"""A model to fine-tune has trained for so many times a run's steps, its learning rate down to 0."""
PRETRAINING_RATE = 8e-3


@dataclass(frozen=True)
class Scale:
    """How large models and runs are.

    ``pretrained`` is what is fine-tuned; None trains a small Llama for it first. ``encoder`` is fine-tuned on the
    sentences in ``glue``; None trains one from scratch on packages of the standard library.
    """

    width: int
    layers: int
    heads: int
    block: int
    batch: int
    steps: int
    vocabulary: int
    rate: int
    fine_tuning_rate: int
    data: str = "stdlib"
    pretrained: str | None = None
    encoder: str | None = None
    glue: str | None = None
    device: str = "cpu"
    autocast: bool = False

    @property
    def init(self) -> float:
        """Standard deviation of new weights: GPT-2's 0.02 at width 768, and as much per unit at any other width."""
        return 0.02 * (768 / self.width) ** 0.5

    def times(self, size: int) -> Scale:
        """The scale with so many times the parameters inside the layers: ``size`` is a square number."""
        return replace(self, width=self.width * isqrt(size))


def tasks(scale: Scale) -> tuple[Task, ...]:
    """The four training tasks at this scale."""
    token, label = "held-out loss, nats a token", "held-out loss, nats a label"
    fine_tuned = "a small Llama" if scale.pretrained is None else Path(scale.pretrained).name
    classes = "8 classes" if scale.encoder is None else "sentences"
    steps, bind = scale.steps, functools.partial
    return (
        Task("gpt", "GPT from scratch", token, steps, scale.rate, bind(gpt, scale), CLIP, tied=True),
        Task("llama", "Llama from scratch", token, steps, scale.rate, bind(llama, scale), CLIP),
        Task(
            "finetune", f"{fine_tuned}, fine-tuned", token, steps // 2, scale.fine_tuning_rate,
            bind(finetune, scale), CLIP,
        ),
        Task(
            "encoder", f"encoder, {classes}", label, steps * 3 // 4,
            scale.rate if scale.encoder is None else scale.fine_tuning_rate, bind(encoder, scale), CLIP,
        ),
    )  # fmt: skip


# ---- the tasks ----------------------------------------------------------------------------------------------------


def gpt(scale: Scale, seed: int) -> Trial:
    """GPT-2's architecture on the corpus, embeddings tied: bytes at the small scale, a BPE at the large."""
    torch.manual_seed(seed)
    vocabulary = BYTES if scale.vocabulary < 1000 else scale.vocabulary
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=scale.block, n_embd=scale.width, n_layer=scale.layers, n_head=scale.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, initializer_range=scale.init,
    )  # fmt: skip
    return next_token(scale, GPT2LMHeadModel(config), text.language(scale.data, vocabulary, scale.block), seed)


def llama(scale: Scale, seed: int) -> Trial:
    """Llama's architecture on a byte-level BPE of the corpus, embeddings not tied."""
    torch.manual_seed(seed)
    return next_token(scale, new_llama(scale), text.language(scale.data, scale.vocabulary, scale.block), seed)


def finetune(scale: Scale, seed: int) -> Trial:
    """A finished language model goes on with documentation: the docstrings of the corpus."""
    if scale.pretrained is not None:
        tokenizer = pretrained_tokenizer(scale.pretrained)
        model: PreTrainedModel = pretrained_model(scale.pretrained, torch.float32)
    else:
        tokenizer = text.bpe(scale.data, scale.vocabulary)
        model = new_llama(scale)
        model.load_state_dict(torch.load(pretrain(scale), weights_only=True))
    return next_token(scale, model, text.documentation(scale.data, tokenizer, scale.block), seed)


def encoder(scale: Scale, seed: int) -> Trial:
    """A classifier of texts: which of eight packages is it from, or GLUE's SST-2 and the like."""
    torch.manual_seed(seed)
    if scale.encoder is not None and scale.glue is not None:
        data = text.sentences(scale.glue, pretrained_tokenizer(scale.encoder), scale.block // 8)
        model = AutoModelForSequenceClassification.from_pretrained(scale.encoder, **in_dtype(torch.float32))
    else:
        data, model = text.packages(scale.data, scale.vocabulary, scale.block // 2), new_encoder(scale)

    def losses(tokens: Tensor, label: Tensor) -> Tensor:
        mask = (tokens != (model.config.pad_token_id or 0)).long().to(scale.device)
        logits = model(input_ids=tokens.to(scale.device), attention_mask=mask).logits
        return F.cross_entropy(logits.float(), label.to(scale.device), reduction="none")

    return trial(scale, model, losses, data, 2 * scale.batch, seed)


# ---- models -------------------------------------------------------------------------------------------------------


def new_llama(scale: Scale) -> LlamaForCausalLM:
    """A Llama with random weights from torch's current seed."""
    config = LlamaConfig(
        vocab_size=scale.vocabulary, hidden_size=scale.width, intermediate_size=scale.width * 5 // 2,
        num_hidden_layers=scale.layers, num_attention_heads=scale.heads, max_position_embeddings=scale.block,
        tie_word_embeddings=False, initializer_range=scale.init,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def new_encoder(scale: Scale) -> ModernBertForSequenceClassification:
    """A ModernBERT with a label for each package and random weights from torch's current seed."""
    config = ModernBertConfig(
        vocab_size=scale.vocabulary, hidden_size=scale.width, intermediate_size=scale.width * 3 // 2,
        num_hidden_layers=scale.layers, num_attention_heads=scale.heads, max_position_embeddings=scale.block,
        classifier_pooling="mean", initializer_range=scale.init,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0,
    )  # fmt: skip
    config.num_labels = len(text.PACKAGES)
    return ModernBertForSequenceClassification(config)


def pretrain(scale: Scale) -> Path:
    """The weights that fine-tuning starts from: AdamW's, kept in the cache folder. They are one seed's, 1000."""
    code = source.digest(sys.modules[__name__], text, trial_module)
    what = hashlib.sha256(repr((scale, text.corpus(scale.data).digest, code)).encode())
    path = cache_dir() / f"convergence-llama-{what.hexdigest()[:16]}.pt"
    if not path.exists():
        torch.manual_seed(1000)
        model, steps = new_llama(scale), FINISHED * scale.steps
        start = next_token(scale, model, text.language(scale.data, scale.vocabulary, scale.block), seed=1000)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE)
        schedule = LambdaLR(optimizer, functools.partial(warmup_and_cosine, steps))
        for step in range(steps):
            start.loss(step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        partial = path.with_suffix(f".partial{os.getpid()}")
        torch.save(model.state_dict(), partial)
        os.replace(partial, path)
    return path


# ---- trials -------------------------------------------------------------------------------------------------------


def next_token(scale: Scale, model: PreTrainedModel, data: Data, seed: int) -> Trial:
    """A trial of next-token prediction; blocks of shape (n, block)."""

    def losses(tokens: Tensor) -> Tensor:
        tokens = tokens.to(scale.device)
        logits = model(input_ids=tokens).logits[:, :-1].float()
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    return trial(scale, model, losses, data, scale.batch, seed)


def trial(
    scale: Scale, model: PreTrainedModel, losses: Callable[..., Tensor], data: Data, batch: int, seed: int
) -> Trial:
    """Batches drawn with ``seed``. ``losses`` of rows are one a row; of a held-out document their mean is measured."""
    nn.Module.to(model, scale.device)
    model.train()
    cast = functools.partial(torch.autocast, scale.device, torch.bfloat16, enabled=scale.autocast)
    order = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(seed))

    def step_loss(step: int) -> Tensor:
        # the order starts anew where a long run has seen everything
        rows = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        with cast():
            return losses(*(part[rows] for part in data.train)).mean()

    @torch.no_grad()
    def evaluate() -> list[float]:
        model.eval()
        size = 4 * batch
        with cast():
            of_rows = torch.cat([
                losses(*(part[i : i + size] for part in data.held_out)) for i in range(0, len(data.document), size)
            ]).double().cpu()  # fmt: skip
        model.train()
        rows = data.document.bincount()
        return (torch.zeros(len(rows), dtype=torch.double).index_add_(0, data.document, of_rows) / rows).tolist()

    embedding = [p for p in model.get_input_embeddings().parameters() if p.requires_grad]
    inside = {id(p) for p in embedding}
    other: list[nn.Parameter] = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    return Trial(other, step_loss, evaluate, embedding=embedding)
