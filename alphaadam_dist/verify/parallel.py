"""The Llama under DeepSpeed's tensor, pipeline, sequence and expert parallelism: over pairs of ranks, at ZeRO-1."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from ..zero import versions
from . import zero
from .model import Llama, next_token_loss
from .settings import DELAYED, EXACT, LAYER, Setting
from .trainee import Trainee, of_all_ranks, of_engine

COLUMNS, ROWS = r".*(attention\.[qkv]|gate|up)\.weight$", r".*(attention\.o|down)\.weight$"
"""Which weights tensor parallelism splits along which dimension, as torch's own does it in ``shardings``."""


@dataclass(frozen=True)
class Pairs(zero.Zero):
    """Parallelism over two ranks each, the rest being data parallel.

    Attributes:
        since: the first DeepSpeed that has it so.
    """

    since: str = ""

    def possible(self, world: int) -> str | None:
        if world % 2:
            return f"not on {world} ranks"
        return f"needs deepspeed>={self.since}" if versions.before(self.since) else None


def of_pair(held: Tensor, dim: int, group: Any) -> Tensor:
    """What both ranks of a pair hold of a parameter, along ``dim``. Collective over the pair."""
    parts = [torch.empty_like(held) for _ in range(2)]
    dist.all_gather(parts, held.contiguous(), group=group)
    return torch.cat(parts, dim)


class AutoTp(Pairs):
    """AutoTP splits heads and inner widths; embedding, norms and head stay whole."""

    def config(self, setting: Setting, batch: int) -> dict[str, Any]:
        specs = [
            {"patterns": [COLUMNS], "partition_type": "column"},
            {"patterns": [ROWS], "partition_type": "row"},
        ]
        split = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
        return {**super().config(setting, batch), "tensor_parallel": split}

    def full_parameters(self, started: Any) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import groups

        group = groups.get_tensor_model_parallel_group()
        for name, param in started.module.named_parameters():
            held = param.detach()
            dims = [dim for dim, pattern in enumerate((COLUMNS, ROWS)) if re.match(pattern, name)]
            for dim in dims:
                held = of_pair(held, dim, group)
            yield name, held.cpu().clone()


class Pipelined(Pairs):
    """PipelineModule: two stages, two micro-batches."""

    @contextmanager
    def trainee(self, model: Llama, setting: Setting, batch: int, fast: bool) -> Iterator[Trainee]:
        from deepspeed.pipe import PipelineModule

        names = ("embedding", *(f"layers.{i}" for i in range(len(model.layers))), "norm", "head")
        now: dict[str, Any] = {}

        def loss(logits: Tensor, tokens: Tensor) -> Tensor:
            return now["scale"] * next_token_loss(logits, tokens)

        def backward(tokens: Tensor, scale: float) -> None:
            """DeepSpeed does it in the step."""
            now.update(scale=scale, parts=[(part, part) for part in tokens.chunk(2)])

        layers = [model.get_submodule(name) for name in names]
        module = PipelineModule(layers, num_stages=2, loss_fn=loss, partition_method="uniform")
        config = {**self.config(setting, batch // 2), "gradient_accumulation_steps": 2}
        optimizer = setting.optimizer(module.named_parameters(), fast)

        def full_parameters() -> Iterable[tuple[str, Tensor]]:
            held = {}
            for name, param in module.named_parameters():
                layer, _, rest = name.partition(".")
                held[f"{names[int(layer)]}.{rest}"] = param.detach().cpu()
            return of_all_ranks(held).items()

        with zero.engine(module, optimizer, config) as started:
            yield Trainee(optimizer, backward, lambda: started.train_batch(iter(now["parts"])), full_parameters)


class Ulysses(Pairs):
    """Two ranks share each sequence: each has half of the positions, in the attention half of the heads."""

    @contextmanager
    def trainee(self, model: Llama, setting: Setting, batch: int, fast: bool) -> Iterator[Trainee]:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.sequence.layer import DistributedAttention

        parallel_state_sp.initialize_sequence_parallel(2)
        group, half = parallel_state_sp.get_sequence_parallel_group(), parallel_state_sp.get_sequence_parallel_rank()
        for layer in model.layers:
            attention: Any = layer.attention
            exchanged = DistributedAttention(attention.mix, group, scatter_idx=2, gather_idx=1)
            object.__setattr__(attention, "mix", lambda q, k, v, exchanged=exchanged: exchanged(q, k, v, 0))
        optimizer = setting.optimizer(model.named_parameters(), fast)
        with zero.engine(model, optimizer, self.config(setting, batch), mpu=parallel_state_sp) as started:

            def backward(tokens: Tensor, scale: float) -> None:
                """DeepSpeed adds up what the ranks of a sequence have of its gradient."""
                first, length = half * tokens.shape[1] // 2, tokens.shape[1] // 2
                logits, targets = started(tokens[:, first : first + length]), tokens[:, first + 1 : first + length + 1]
                logits = logits[:, : targets.shape[1]].flatten(0, 1)
                loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") / tokens[:, 1:].numel()
                started.backward(scale * loss)

            yield Trainee(optimizer, backward, started.step, lambda: self.full_parameters(started))
        parallel_state_sp._release_sequence_parallel_groups()


class AutoEp(Pairs):
    """AutoEP: each rank has half of the experts, and the tokens of both ranks that the router sends to them."""

    def config(self, setting: Setting, batch: int) -> dict[str, Any]:
        mixtral = {"preset_model": "mixtral", "moe_layer_pattern": r"layers\.\d+\.feed_forward"}
        experts = {"enabled": True, "autoep_size": 2, "use_grouped_mm": False, **mixtral}
        return {**super().config(setting, batch), "expert_parallel": experts}

    @contextmanager
    def trainee(self, model: Llama, setting: Setting, batch: int, fast: bool) -> Iterator[Trainee]:
        from deepspeed.moe.utils import configure_moe_param_groups

        def optimizer(params: Iterable[Tensor]) -> Optimizer:
            """AutoEP makes parameters of its own, so the optimizer comes after it."""
            return setting.optimizer(configure_moe_param_groups(list(params)), fast)

        with zero.engine(model, optimizer, self.config(setting, batch)) as started:
            yield of_engine(started, started.basic_optimizer, self.full_parameters)

    def full_parameters(self, started: Any) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import groups

        params = dict(started.module.named_parameters())

        def stacked(name: str) -> Tensor:
            return of_pair(params[name].detach(), 0, groups._get_expert_parallel_group("ep_size_2")).cpu()

        for name, param in params.items():
            experts, _, weight = name.rpartition(".")
            if weight == "w1":
                yield f"{experts}.gate_up_proj", torch.cat((stacked(name), stacked(f"{experts}.w3")), 1)
            elif weight == "w2":
                yield f"{experts}.down_proj", stacked(name)
            elif weight != "w3":
                yield name.replace("router.gate", "gate"), param.detach().cpu().clone()


KINDS = (
    Ulysses("Ulysses", 1, (EXACT, DELAYED), since="0.17.2"),
    Pipelined("PipelineModule", 1, (EXACT, DELAYED), since="0.19.8"),
    AutoTp("AutoTP", 1, (EXACT, LAYER), since="0.19.8"),
    AutoEp("AutoEP", 1, (EXACT, DELAYED), experts=True, since="0.19.8"),
)
