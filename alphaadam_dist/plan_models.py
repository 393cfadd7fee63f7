"""Sizes of the models that `alphaadam plan` plans for: built-in ones, or any that a Hugging Face config describes."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BF16 = 2
FOUR_BITS = 4.5 / 8
"""Bytes of a weight in 4 bits: bitsandbytes' NF4, with a scale in fp32 for every 64 of them."""

_Config = tuple[str, dict[str, Any]]


def _decoder(
    kind: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, head: int, *, tied: bool = False
) -> _Config:
    sizes = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head, "tie_word_embeddings": tied,
    }  # fmt: skip
    return f"{kind}ForCausalLM", sizes


BUILT_IN: dict[str, _Config] = {
    "llama-7b": _decoder("Llama", 32000, 4096, 11008, 32, 32, 32, 128),
    "llama-3-1b": _decoder("Llama", 128256, 2048, 8192, 16, 32, 8, 64, tied=True),
    "llama-3-3b": _decoder("Llama", 128256, 3072, 8192, 28, 24, 8, 128, tied=True),
    "llama-3-8b": _decoder("Llama", 128256, 4096, 14336, 32, 32, 8, 128),
    "llama-3-70b": _decoder("Llama", 128256, 8192, 28672, 80, 64, 8, 128),
    "mistral-7b": _decoder("Mistral", 32000, 4096, 14336, 32, 32, 8, 128),
    "mistral-nemo-12b": _decoder("Mistral", 131072, 5120, 14336, 40, 32, 8, 128),
    "mistral-small-24b": _decoder("Mistral", 131072, 5120, 32768, 40, 32, 8, 128),
    "qwen2.5-7b": _decoder("Qwen2", 152064, 3584, 18944, 28, 28, 4, 128),
    "qwen2.5-72b": _decoder("Qwen2", 152064, 8192, 29568, 80, 64, 8, 128),
    "qwen3-0.6b": _decoder("Qwen3", 151936, 1024, 3072, 28, 16, 8, 128, tied=True),
    "qwen3-1.7b": _decoder("Qwen3", 151936, 2048, 6144, 28, 16, 8, 128, tied=True),
    "qwen3-4b": _decoder("Qwen3", 151936, 2560, 9728, 36, 32, 8, 128, tied=True),
    "qwen3-8b": _decoder("Qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
    "qwen3-14b": _decoder("Qwen3", 151936, 5120, 17408, 40, 40, 8, 128),
    "qwen3-32b": _decoder("Qwen3", 151936, 5120, 25600, 64, 64, 8, 128),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}),
    "roberta-base": (
        "RobertaForMaskedLM",
        {"vocab_size": 50265, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
}  # fmt: skip
"""Classes of transformers, and the sizes in their configs. Llama-3 of 1B and 3B is Llama-3.2."""

LINEAR = ("Linear", "Conv1D")
"""Modules of a block that get adapters. Conv1D is GPT-2's name for a linear layer with a transposed weight."""


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that a plan depends on, in elements; tied weights count once."""

    name: str
    total: int
    tensors: int
    """That are trained."""
    largest: int
    """Of the module with the most parameters of its own, the least that ZeRO-3 can gather."""
    block: int
    """Of the largest transformer block, what FSDP gathers at a time."""
    rest: int
    """Outside the blocks: FSDP keeps that gathered."""
    frozen: int = 0
    """Under adapters."""
    four_bit: int = 0
    """Of the frozen ones, those in 4 bits."""

    @property
    def trained(self) -> int:
        """Elements that the optimizer steps."""
        return self.total - self.frozen

    @property
    def frozen_bytes(self) -> float:
        """What the frozen weights take, in bf16 or 4 bits."""
        return BF16 * (self.frozen - self.four_bit) + FOUR_BITS * self.four_bit


def shapes(model: str, adapters: int | None = None, *, four_bit: bool = False) -> Shapes:
    """Sizes of a built-in model, or of the one that a Hugging Face config describes; no weights are made or loaded.

    Args:
        model: a name of BUILT_IN, a local folder with a config.json, or a hub id.
        adapters: the rank of LoRA adapters on every linear layer of the blocks; all else is frozen. None: all is
            trained.
        four_bit: these linear layers are in 4 bits (QLoRA).

    Raises:
        ValueError: there is no such config, or transformers cannot build a model from it; or it has no linear layers
            for adapters.
    """
    built = _built(model)
    numels = [param.numel() for param in built.parameters()]
    # What Accelerate shards as units of their own.
    units = [module for module in built.modules() if type(module).__name__ in (built._no_split_modules or ())]
    blocks = [sum(param.numel() for param in module.parameters()) for module in units]
    sizes = Shapes(
        name=model,
        total=sum(numels),
        tensors=len(numels),
        largest=max(sum(param.numel() for param in module.parameters(recurse=False)) for module in built.modules()),
        block=max(blocks, default=0),
        rest=sum(numels) - sum(blocks),
    )
    return sizes if adapters is None else _with_adapters(sizes, units, adapters, four_bit)


def _with_adapters(base: Shapes, blocks: list[Any], rank: int, four_bit: bool) -> Shapes:
    linear = [[layer.weight for layer in block.modules() if type(layer).__name__ in LINEAR] for block in blocks]
    added = [rank * sum(sum(weight.shape) for weight in weights) for weights in linear]  # A: rank x in, B: out x rank
    if not sum(added):
        raise ValueError(f"MODEL is {base.name}: it has no blocks with linear layers, on which adapters could be")
    return Shapes(
        name=f"{base.name} under {'QLoRA' if four_bit else 'LoRA'} of rank {rank}",
        total=base.total + sum(added),
        tensors=2 * sum(map(len, linear)),
        largest=base.largest,
        block=base.block + max(added),
        rest=base.rest,
        frozen=base.total,
        four_bit=sum(weight.numel() for weights in linear for weight in weights) if four_bit else 0,
    )


def _built(model: str) -> Any:
    """The model on the meta device."""
    import torch
    import transformers

    if model in BUILT_IN:
        kind, sizes = BUILT_IN[model]
        config = getattr(transformers, kind).config_class(**sizes)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(model)
        except Exception as error:  # a config.json of another shape fails in many ways
            near = difflib.get_close_matches(model, BUILT_IN, n=1)
            hint = f"did you mean {near[0]}? Otherwise give" if near else "give"
            raise ValueError(
                f"MODEL is {model}: {hint} {', '.join(BUILT_IN)}, a folder with a config.json, or a Hugging Face id. "
                f"What went wrong: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from None
        kind = str((config.architectures or [""])[0])
    try:
        with torch.device("meta"):
            if hasattr(transformers, kind):
                return getattr(transformers, kind)._from_config(config)
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a class of transformers raises for sizes that do not fit together
        raise ValueError(
            f"MODEL is {model}: transformers cannot build a model from its config ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}); correct {Path(model) / 'config.json'}"
        ) from None
