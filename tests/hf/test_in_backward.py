"""HF's Trainer with the step in backward: what it does beside is not disturbed, and what would be lost is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from alphaadam_dist import AlphaAdam
from tests.hf import trainer
from tests.hf.test_fsdp import FSDP2
from tests.models import tiny_llama
from tests.ranks import RankError, Ranks
from tests.unit.problems import same_bits

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {
    **trainer.ARGUMENTS, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0,
}  # fmt: skip


def trained(folder: str, arguments: dict[str, Any]) -> tuple[list[str], Any]:
    """What differs from the Trainer's own way, and what the runs logged of alpha."""
    runs = [run(folder, {**ARGUMENTS, **arguments}, in_backward=in_backward) for in_backward in (True, False)]
    (ours, alphas), (theirs, expected) = runs
    wrong = [name for name in ours if not same_bits(ours[name], theirs[name])]
    return wrong + ([] if alphas == expected else [f"{alphas} and {expected}"]), alphas


def run(folder: str, arguments: dict[str, Any], *, in_backward: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    with trainer.clean():
        args = TrainingArguments(output_dir=folder, **arguments)
        if args.fsdp:
            trainer.shard_on_cpu(args)
        client = (AlphaAdam, {**trainer.ADAM, "sync": "delayed"})
        data = trainer.Sequences(trainer.STEPS)
        hf = trainer.in_order()(model=tiny_llama(), args=args, train_dataset=data, optimizer_cls_and_kwargs=client)

        class InBackward(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                hf.optimizer.optimizer.step_in_backward(hf.model_wrapped)

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                assert all(param.grad is None for param in hf.model.parameters())
                assert all(isinstance(param, DTensor) == bool(args.fsdp) for param in hf.model.parameters())

        if in_backward:
            hf.add_callback(InBackward())
        hf.remove_callback(PrinterCallback)
        hf.train()
        return trainer.own_params(hf.model), [entry["alpha"] for entry in hf.state.log_history if "alpha" in entry]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_it_trains_as_without(ranks2: Ranks, tmp_path: Any, sharding: str) -> None:
    for wrong, alphas in ranks2.run(trained, str(tmp_path), FSDP2 if sharding == "fsdp2" else {}):
        assert wrong == []
        assert len(alphas) == trainer.STEPS
        assert alphas[-1] > 1


def test_one_process(ranks1: Ranks, tmp_path: Any) -> None:
    ((wrong, alphas),) = ranks1.run(trained, str(tmp_path), {})
    assert wrong == []
    assert alphas[-1] > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 with step_in_backward.*Give max_grad_norm=0"),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, "no gradient accumulation"),
    ],
)
def test_what_would_be_lost_is_refused(ranks1: Ranks, tmp_path: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(RankError, match=f"(?s){says}"):
        ranks1.run(trained, str(tmp_path), arguments)
