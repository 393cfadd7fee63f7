"""The Llama under DeepSpeed's ZeRO."""

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .model import Llama
from .settings import DELAYED, EXACT, LAYER, THRESHOLD, Setting
from .trainee import Trainee, of_engine


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
    deepspeed.init_distributed(dist_init_required=False)  # pipelines ask for it before there is an engine
    gc.freeze()  # it collects garbage for every ZeRO-3 engine, a second's work among all that was imported
    return deepspeed


@contextmanager
def engine(
    model: nn.Module,
    optimizer: Optimizer | Callable[[Any], Optimizer],
    config: dict[str, Any],
    **arguments: Any,
) -> Iterator[Any]:
    """DeepSpeed's engine, and afterwards its process as it was: it keeps the groups of its parallelism."""
    from deepspeed.utils import groups

    before = {name: dict(held) if isinstance(held, dict) else held for name, held in vars(groups).items()}
    started = _deepspeed().initialize(model=model, optimizer=optimizer, config=config, **arguments)[0]
    try:
        yield started
        started.destroy()
    finally:
        vars(groups).update(before)


@dataclass(frozen=True)
class Zero:
    """A stage of ZeRO: in fp32 or with a model in bf16, and with the optimizer's part on the device or on the CPU.

    Attributes:
        experts: the model is the one with experts.
    """

    name: str
    stage: int
    settings: Sequence[Setting]
    bf16: bool = False
    offload: bool = False
    experts: bool = False

    def possible(self, world: int) -> str | None:
        """Why this cannot be tried on so many ranks; None where it can."""
        return None

    def config(self, setting: Setting, batch: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_clipping": setting.options.get("clip_norm", 0.0),  # DeepSpeed itself clips
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

    @contextmanager
    def trainee(self, model: Llama, setting: Setting, batch: int, fast: bool) -> Iterator[Trainee]:
        """The Llama under deepspeed.initialize, without a launcher's help. Collective."""
        optimizer = setting.optimizer(model.named_parameters(), fast, clip_norm=None)
        with engine(model, optimizer, self.config(setting, batch)) as started:
            yield of_engine(started, optimizer, self.full_parameters)

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
