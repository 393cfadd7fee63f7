"""HF's Trainer and Accelerate with FSDP2 and FSDP1 on two ranks: the steps of one process.

On the CPU Accelerate would train on without sharding; ``shard_on_cpu`` makes it shard, as it does on GPUs. The
Trainer's own FSDP1, which it is about to drop, broadcasts through a GPU and cannot run here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from alphaadam_dist import AlphaAdam
from alphaadam_dist.training.trainer import FSDP2
from tests.hf import trainer
from tests.hf.test_trainer import check
from tests.models import tiny_llama
from tests.ranks import Ranks
from tests.zero import engine

pytestmark = pytest.mark.slow

CLIP = 0.5


def sharded(states: str) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": {**FSDP2["fsdp_config"], "state_dict_type": states}}


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"clip_norm": CLIP}], ids=["exact", "delayed", "clip"])
def test_trainer_fsdp2(ranks2: Ranks, tmp_path: Path, options: dict[str, Any]) -> None:
    """Clipped by the Trainer, through Accelerate, or by the optimizer."""
    arguments = {**FSDP2, **({"max_grad_norm": 0.0} if "clip_norm" in options else {})}
    ranks = ranks2.run(trainer.train, str(tmp_path), None, arguments, client={**trainer.ADAM, **options})
    clip = 0.0 if "clip_norm" in options else CLIP
    check(ranks, trainer.alone(trainer.hf_groups, options, clip=clip), f"Trainer, FSDP2, {options}")
    assert [group["weight_decay"] for group in ranks[0]["groups"]] == [0.2, 0.0]


@pytest.mark.parametrize("states", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_trainer_resumes(ranks2: Ranks, tmp_path: Path, states: str) -> None:
    """The resumed model starts from other weights, so that only the checkpoint can explain where it ends."""
    arguments = {**sharded(states), "save_strategy": "steps", "save_steps": 4}
    client = {**trainer.ADAM, "sync": "delayed", "alpha_warmup": 5}
    straight = ranks2.run(trainer.train, str(tmp_path), None, arguments, client=client)
    checkpoint = str(tmp_path / "checkpoint-4")
    resumed = ranks2.run(trainer.train, str(tmp_path), None, arguments, client=client, seed=1, resume=checkpoint)
    for result, expected in zip(resumed, straight, strict=True):
        assert result["seen"] == expected["seen"][4:]
        assert result["state"] == expected["state"]
        for name, param in expected["params"].items():
            assert torch.equal(result["params"][name], param), name


def as_on_gpus() -> None:
    """What ``shard_on_cpu`` does, and the device without the index that FSDP1 cannot have on a CPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


def accelerate(version: int, options: dict[str, Any]) -> dict[str, Any]:
    """The training loop of Accelerate's documentation, clipping through the accelerator."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState

    with trainer.clean():
        PartialState(cpu=True)
        as_on_gpus()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version, reshard_after_forward=True if version == 2 else "FULL_SHARD", use_orig_params=True,
            auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )  # fmt: skip
        accelerator = Accelerator(fsdp_plugin=plugin)
        model: Any = tiny_llama()
        batches: Any = torch.utils.data.DataLoader(trainer.Sequences(trainer.STEPS), batch_size=4)
        if version == 1:  # it makes new parameters, so the optimizer comes after
            model = accelerator.prepare(model)
            options = {"process_group": dist.group.WORLD, **options}
            optimizer: Any = accelerator.prepare(AlphaAdam(trainer.hf_groups(model), **{**trainer.ADAM, **options}))
            batches = accelerator.prepare(batches)
        else:
            optimizer = AlphaAdam(trainer.hf_groups(model), **{**trainer.ADAM, **options})
            model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        assert not isinstance(model, DistributedDataParallel), "Accelerate did not shard"
        assert version == 1 or all(isinstance(param, DTensor) for param in model.parameters())
        seen = []
        found = trainer.find(optimizer)
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(engine.observe(found))
        if version == 1:
            with FullyShardedDataParallel.summon_full_params(model):
                named = model.named_parameters()
                params = {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in named}
        else:
            params = trainer.own_params(model)
        return {"seen": seen, "optimizer": type(found).__name__, "params": params}


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}], ids=["exact", "delayed"])
@pytest.mark.parametrize("version", [1, 2])
def test_accelerate(ranks2: Ranks, version: int, options: dict[str, Any]) -> None:
    alone = trainer.alone(trainer.hf_groups, options, scheduler=lambda optimizer: NoSchedule(), clip=CLIP)
    check(ranks2.run(accelerate, version, options), alone, f"Accelerate, FSDP{version}, {options}")


def test_fsdp1_asks_for_its_process_group(ranks2: Ranks) -> None:
    with pytest.raises(Exception, match="process_group"):
        ranks2.run(accelerate, 1, {"process_group": None})


class NoSchedule:
    def step(self) -> None:
        pass
