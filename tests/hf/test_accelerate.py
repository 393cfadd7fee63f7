"""Accelerate without HF's Trainer: the optimizer as an object, or named in the JSON behind a DummyOptim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from tests.hf import trainer
from tests.hf.test_offload import OFFLOAD, NoKernel
from tests.hf.test_trainer import check
from tests.models import tiny_llama
from tests.ranks import Ranks
from tests.zero import engine

pytestmark = pytest.mark.slow

CLIP = 0.5


def config(stage: int, accumulate: int = 1, named: bool = False, **zero: Any) -> dict[str, Any]:
    """What a user of Accelerate writes: batch sizes filled in, clipping said (unsaid it would be 1)."""
    result: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, **zero},
    }
    if named:
        params = {"lr": "auto", "weight_decay": "auto", "betas": [0.8, 0.95], "eps": 1e-7, "no_decay": ["norm"]}
        result["optimizer"] = {"type": "AlphaAdam", "params": params}
    return result


def decayed(step: int) -> float:
    return 0.8**step


def train(ds_config: dict[str, Any] | None, *, accumulate: int = 1, schedule: bool = True,
          options: dict[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """The training loop of Accelerate's documentation, with and without DeepSpeed."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.utils import DummyOptim, DummyScheduler

    with trainer.clean():
        PartialState(cpu=True)  # on machines without GPUs DeepSpeed's plugin alone finds one process
        plugin = None if ds_config is None else DeepSpeedPlugin(hf_ds_config=ds_config)
        accelerator = Accelerator(
            cpu=ds_config is None,  # True would leave the plugin out
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=accumulate,
            step_scheduler_with_optimizer=False,  # else it steps once for each process
        )
        model: Any = tiny_llama()
        batches: Any = torch.utils.data.DataLoader(trainer.Sequences(trainer.STEPS), batch_size=4 // accumulate)
        if ds_config is not None and "optimizer" in ds_config:
            trainable = [param for param in model.parameters() if param.requires_grad]
            optimizer: Any = DummyOptim(trainable, lr=trainer.ADAM["lr"], weight_decay=0.2)
            scheduler: Any = DummyScheduler(optimizer, lr_scheduler_callable=schedule_of)
        else:
            optimizer = AlphaAdam(trainer.hf_groups(model), **{**trainer.ADAM, **(options or {})})
            scheduler = schedule_of(optimizer)
        model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, batches, scheduler)
        seen = []
        found = trainer.find(optimizer)
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                    seen.append(engine.observe(found))
                optimizer.zero_grad()
        result = {
            "seen": seen,
            "optimizer": type(found).__name__,
            "groups": [{k: g[k] for k in ("lr", "betas", "eps", "weight_decay")} for g in found.param_groups],
            "params": engine.masters(model) if ds_config else trainer.own_params(accelerator.unwrap_model(model)),
        }
        if ds_config is not None:
            model.destroy()
    return result


def schedule_of(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, decayed)


def alone(options: dict[str, Any] | None = None) -> dict[str, Any]:
    return trainer.alone(trainer.hf_groups, options, scheduler=schedule_of, clip=CLIP)


@pytest.mark.parametrize(("stage", "accumulate"), [(0, 2), (2, 1), (2, 2), (3, 2)])
def test_an_object(ranks2: Ranks, stage: int, accumulate: int) -> None:
    ranks = ranks2.run(train, config(stage, accumulate), accumulate=accumulate)
    check(ranks, alone(), f"Accelerate, stage {stage}, accumulated {accumulate} times")
    assert [group["weight_decay"] for group in ranks[0]["groups"]] == [0.2, 0.0]
    assert ranks[0]["groups"][0]["lr"] == pytest.approx(trainer.ADAM["lr"] * decayed(trainer.STEPS))


@pytest.mark.parametrize(("stage", "accumulate"), [(2, 1), (3, 2)])
def test_named_in_the_json(ranks2: Ranks, stage: int, accumulate: int) -> None:
    """lr and weight decay come from the DummyOptim, the rest from the JSON, and so do the two groups."""
    ranks = ranks2.run(train, config(stage, accumulate, named=True), accumulate=accumulate)
    check(ranks, alone(), f"Accelerate, JSON, stage {stage}")
    assert [group["weight_decay"] for group in ranks[0]["groups"]] == [0.2, 0.0]


def test_delayed(ranks2: Ranks) -> None:
    options = {"sync": "delayed"}
    check(ranks2.run(train, config(2), options=options), alone(options), "Accelerate, delayed")


def test_without_deepspeed(ranks2: Ranks) -> None:
    check(ranks2.run(train, None, accumulate=2), alone(), "Accelerate, DDP")


def swapped(ds_config: dict[str, Any]) -> Any:
    from deepspeed.ops.adam import cpu_adam

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_adam, "CPUAdamBuilder", NoKernel)
        return train(ds_config)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_swap_is_refused(ranks2: Ranks, stage: int) -> None:
    with pytest.raises(Exception, match=r'replaced by DeepSpeedCPUAdam.*"zero_force_ds_cpu_optimizer": false'):
        ranks2.run(swapped, config(stage, **OFFLOAD))


@pytest.mark.parametrize("named", [False, True], ids=["object", "json"])
def test_offload_without_a_swap(ranks2: Ranks, named: bool) -> None:
    ds_config = {**config(2, named=named, **OFFLOAD), "zero_force_ds_cpu_optimizer": named}
    check(ranks2.run(train, ds_config), alone(), "Accelerate, offload")


def both(ds_config: dict[str, Any]) -> Any:
    """An object although the JSON names one."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    with trainer.clean():
        PartialState(cpu=True)
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config))
        model = nn.Linear(4, 4)
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(Tensor(4, 4)), batch_size=2)
        accelerator.prepare(model, AlphaAdam(model.parameters()), batches)


def test_both_are_refused(ranks2: Ranks) -> None:
    with pytest.raises(Exception, match="cannot specify an optimizer in the config file and in the code"):
        ranks2.run(both, config(2, named=True))
