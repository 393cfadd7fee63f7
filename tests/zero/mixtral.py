"""A model that DeepSpeed's AutoEP takes for Mixtral, and an engine that splits its experts over pairs of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch import nn

from alphaadam_dist.verify.experts import CHOSEN, EXPERTS, Mixture
from tests.zero import engine

WIDTH, INNER = 16, 24
LAYER = "model.layers.0.mlp"


class Mixtral(nn.Module):
    """A norm and a layer of experts, where Transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.model, layer = nn.Module(), nn.Module()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer.norm, layer.mlp = nn.LayerNorm(WIDTH), Mixture(WIDTH, EXPERTS * INNER)
            for weights in layer.mlp.experts.parameters():
                nn.init.normal_(weights, std=0.3)
        self.model.layers = nn.ModuleList([layer])
        self.config = SimpleNamespace(
            model_type="mixtral", num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, hidden_size=WIDTH,
            intermediate_size=INNER, hidden_act="silu",
        )  # fmt: skip


def start(model: Mixtral, stage: int, kind: str, **params: Any) -> Any:
    """The engine, its optimizer named in the JSON."""
    expert_parallel = {"enabled": True, "autoep_size": 2, "preset_model": "mixtral", "use_grouped_mm": False}
    config = {**engine.config(stage), "expert_parallel": expert_parallel, "zero_allow_untested_optimizer": True}
    config["optimizer"] = {"type": kind, "params": {"weight_decay": 0.1, **params}}
    return deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
