"""A small Llama in plain torch, and tokens for it to learn: what ``alphaadam verify`` trains under every sharding."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

HEADS = 4


class Attention(nn.Module):
    """Causal attention with rotary positions. A rank of tensor parallelism sees its share of the heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.size)) for part in (self.q, self.k, self.v))
        return self.o(self.mix(q, k, v).flatten(-2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of whole sequences, (batch, length, heads, size) each."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q), rotate(k)
        # written out because fused attention may sum in another order on every run
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-6)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """A decoder of about 20 thousand parameters, with an odd vocabulary. Weights depend on ``seed`` alone.

    ``width`` is a multiple of 8. At 256 it has 1.2 million parameters. ``feed_forward`` is made of a width and an inner
    width.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        vocabulary: int = 67,
        width: int = 32,
        layers: int = 2,
        feed_forward: Callable[[int, int], nn.Module] = FeedForward,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width, HEADS, feed_forward(width, width * 7 // 4)) for _ in range(layers)])
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                if param.ndim > 1:
                    param.copy_(0.1 * torch.randn(param.shape, generator=generator, device="cpu"))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class InBfloat16(nn.Module):
    """Mixed precision in one process: ``module`` keeps its fp32 parameters, forward and backward run in bf16."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.bfloat16().float()  # parameters begin as the model has them

    def forward(self, tokens: Tensor) -> Tensor:
        rounded = {name: param.bfloat16() for name, param in self.module.named_parameters()}
        return functional_call(self.module, rounded, (tokens,))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864) on (batch, heads, length, size)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = torch.arange(length, device=x.device, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of each token given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def token_batches(steps: int, batch: int, *, length: int = 16, vocabulary: int = 67, seed: int = 1) -> Tensor:
    """Token ids, (steps, batch, length) on the CPU: most are their predecessor plus three, so they can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocabulary, (steps, batch, 1), generator=generator, device="cpu")
    tokens = (first + 3 * torch.arange(length, device="cpu")) % vocabulary
    noise = torch.rand(tokens.shape, generator=generator, device="cpu") < 0.2
    tokens[noise] = torch.randint(vocabulary, (int(noise.sum()),), generator=generator, device="cpu")
    return tokens
