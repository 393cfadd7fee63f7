"""Models for tests: one whose gradients are given, and a tiny Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Given(nn.Module):
    """Parameters of shapes that nobody likes, and a loss whose gradient at every parameter is a given tensor."""

    EMBEDDING, WEIGHT = (67, 8), (16, 9)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.embedding = parameter(*self.EMBEDDING)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.weight = parameter(*self.WEIGHT)
        self.norm = parameter(9)
        self.bias = parameter(3)
        self.one = parameter(1)
        self.tied = self.embedding

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((getattr(self, name).float() * gradient).sum() for name, gradient in gradients.items())  # type: ignore[return-value]


def given_gradients(steps: int, seed: int = 1, like: nn.Module | None = None) -> list[dict[str, Tensor]]:
    """For each step a gradient for every trainable parameter of Given: exact in bf16, rows of zeros, zero elements."""
    generator = torch.Generator().manual_seed(seed)
    named = [(n, p.shape) for n, p in (like or Given()).named_parameters() if p.requires_grad]
    drift = {n: torch.randn(shape, generator=generator) for n, shape in named}
    result = []
    for _ in range(steps):
        step = {n: (0.5 * drift[n] + torch.randn(s, generator=generator)).bfloat16().float() for n, s in named}
        for n, gradient in step.items():
            gradient[torch.rand(gradient.shape, generator=generator) < 0.1] = 0.0
            if n == "embedding":
                gradient[torch.rand(len(gradient), generator=generator) < 0.5] = 0.0
        result.append(step)
    return result


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups, as everybody makes them: matrices decay, the rest does not."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def tiny_llama(seed: int = 0, tied: bool = False) -> nn.Module:
    """A Llama of two layers and about 12 thousand parameters, with an odd vocabulary; equal weights for equal seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def token_batches(steps: int, batch: int, length: int = 16, seed: int = 2) -> Tensor:
    """Token ids with some structure to learn: (steps, batch, length), each token mostly its predecessor plus three."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(67, (steps, batch, 1), generator=generator)
    tokens = (first + 3 * torch.arange(length)) % 67
    noise = torch.rand(tokens.shape, generator=generator) < 0.2
    tokens[noise] = torch.randint(67, (int(noise.sum()),), generator=generator)
    return tokens
