"""Models that only the recipes make: a GPT-2 from scratch, and LoRA adapters on a pretrained model."""

from typing import TYPE_CHECKING

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from peft import PeftModel


def with_lora(model: PreTrainedModel, rank: int) -> "PeftModel":
    """The model with LoRA adapters of this rank on every linear layer but the head; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def gpt2(tokenizer: PreTrainedTokenizerBase, *, layers: int, hidden: int, heads: int, block: int) -> PreTrainedModel:
    """A GPT-2 with random weights from the current seed, without dropout: one pass over the data does not overfit."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=layers,
        n_embd=hidden,
        n_head=heads,
        n_positions=block,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)
