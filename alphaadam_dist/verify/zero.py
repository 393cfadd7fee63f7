"""The Llama under DeepSpeed's ZeRO."""

import functools
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .model import Llama
from .settings import DELAYED, EXACT, LAYER, THRESHOLD, Setting


def problem() -> str | None:
    """Why there is no DeepSpeed to try; None where there is."""
    if find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    try:
        _deepspeed()
    except Exception as error:
        return f"DeepSpeed cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _deepspeed() -> Any:
    """The module, without its log."""
    import deepspeed
    from deepspeed.utils.logging import logger

    logger.setLevel("ERROR")
    gc.freeze()  # it collects garbage for every ZeRO-3 engine, a second's work among all that was imported
    return deepspeed


@dataclass(frozen=True)
class Zero:
    """A stage of ZeRO: in fp32 or with a model in bf16, and with the optimizer's part on the device or on the CPU."""

    name: str
    stage: int
    settings: Sequence[Setting]
    bf16: bool = False
    offload: bool = False

    def engine(self, model: Llama, setting: Setting, batch: int, fast: bool) -> tuple[Any, torch.optim.Optimizer]:
        """deepspeed.initialize without a launcher's help. DeepSpeed itself clips."""
        clip = setting.options.get("clip_norm", 0.0)
        optimizer = setting.optimizer(model.named_parameters(), fast, clip_norm=None)
        config = {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_clipping": clip,
            "bf16": {"enabled": self.bf16},
            "zero_optimization": {
                "stage": self.stage,
                "stage3_param_persistence_threshold": 0,
                "memory_efficient_linear": False,  # stage 3's own linear layer sums in another order
                **({"offload_optimizer": {"device": "cpu"}} if self.offload else {}),
            },
            "zero_force_ds_cpu_optimizer": False,  # for torch's AdamW, beside which AlphaAdam is measured,
            "zero_allow_untested_optimizer": True,  # as this
        }
        return _deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0], optimizer

    def full_parameters(self, started: Any) -> Iterator[tuple[str, Tensor]]:
        """The whole fp32 parameters by name, copied to the CPU. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = list(started.module.named_parameters())
        if self.bf16:
            yield from [(name, safe_get_full_fp32_param(param).cpu().clone()) for name, param in named]
            return
        with _deepspeed().zero.GatheredParameters([param for _, param in named], enabled=self.stage == 3):
            yield from [(name, param.detach().cpu().clone()) for name, param in named]


_FP32 = (EXACT, DELAYED, LAYER)
KINDS = (
    *(Zero(f"ZeRO-{stage}", stage, _FP32) for stage in range(4)),
    *(Zero(f"ZeRO-{stage} bf16", stage, (EXACT, THRESHOLD), bf16=True) for stage in (2, 3)),
    *(Zero(f"ZeRO-{stage} offload", stage, (DELAYED, THRESHOLD), bf16=True, offload=True) for stage in (2, 3)),
)
