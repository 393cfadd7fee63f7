"""``"groups"`` of a JSON-named optimizer: equal to one process, kept by every scheduler and through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alphaadam_dist import AlphaAdam, parameter_groups
from tests.checkpoint.test_universal import convert
from tests.equality.given import GROUPS
from tests.hf import trainer
from tests.hf.test_no_decay import MODES, start, train
from tests.hf.test_trainer import check, warmup_decay
from tests.models import Given, given_gradients
from tests.older import needs_universal_checkpoints, since_deepspeed
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_equality import assert_equal

pytestmark = pytest.mark.slow

SCALES = [1.0, 4.0, 0.3]


def alone(dtype: torch.dtype = torch.float32, lrs: list[float] | None = None, betas: Any = None) -> dict[str, Any]:
    """One process; the groups' own rates, at each step if ``lrs`` says, are written by hand."""
    model = Given().to(dtype).float()
    model.frozen = None  # DeepSpeed leaves it out
    groups = parameter_groups(model, GROUPS)
    scales = [group.pop("lr_scale", 1.0) for group in groups]
    optimizer = AlphaAdam(groups, weight_decay=0.1)
    seen = []
    for step, gradients in enumerate(given_gradients(10)):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = (engine.LR if lrs is None else lrs[step]) * scale
            group["betas"] = (0.9, 0.999) if betas is None else betas[step]
        for name, param in model.named_parameters():
            param.grad = gradients[name]
        optimizer.step()
        seen.append(engine.observe(optimizer))
    return {"params": {n: p.detach().clone() for n, p in model.named_parameters()}, "seen": seen}


@pytest.mark.parametrize("mode", MODES)
def test_equals_groups_written_by_hand_in_one_process(ranks2: Ranks, mode: str) -> None:
    ranks = ranks2.run(train, mode, {"groups": GROUPS})
    assert_equal(ranks, alone(torch.bfloat16 if "bf16" in mode else torch.float32))
    assert ranks[0]["decays"] == [0.1, 0.1, 0.0]


def test_four_ranks(ranks4: Ranks) -> None:
    for mode in ("zero2", "zero3-init"):
        assert_equal(ranks4.run(train, mode, {"groups": GROUPS}), alone())


SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_min_lr": 1e-4, "warmup_max_lr": 2e-2, "warmup_num_steps": 6},
    "WarmupDecayLR": {"total_num_steps": 10, "warmup_max_lr": 2e-2, "warmup_num_steps": 3},
    "WarmupCosineLR": {"total_num_steps": 10, "warmup_num_steps": 3},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 2e-2, "cycle_first_step_size": 4},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 1.0},
}


def scheduled(mode: str, scheduler: str) -> dict[str, Any]:
    ds_config, zero_init = MODES[mode]
    ds_config = {**ds_config, "scheduler": {"type": scheduler, "params": SCHEDULERS[scheduler]}}
    started = start(ds_config, {"groups": GROUPS}, zero_init)
    seen, held = [], []
    for gradients in given_gradients(10):
        groups = started.basic_optimizer.param_groups
        held.append([(float(g["lr"]), tuple(g["betas"]), g["lr_scale"]) for g in groups])
        started.backward(started(gradients))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
    result = {"params": engine.masters(started), "seen": seen, "held": held}
    started.destroy()
    return result


COSINE = pytest.param(
    "WarmupCosineLR", marks=since_deepspeed("0.16.0", "starts the first group at 0 and the others at their whole rate")
)


@pytest.mark.parametrize("scheduler", [COSINE if name == "WarmupCosineLR" else name for name in SCHEDULERS])
@pytest.mark.parametrize("mode", ["zero2", "zero3-init"])
def test_schedulers_of_deepspeed_keep_lr_scale(ranks2: Ranks, mode: str, scheduler: str) -> None:
    """They write one lr into every group, and the steps are those of rates written by hand."""
    ranks = ranks2.run(scheduled, mode, scheduler)
    held = ranks[0]["held"]
    assert all([scale for *_, scale in groups] == SCALES for groups in held)
    assert all(len({lr for lr, *_ in groups}) == 1 for groups in held)
    lrs = [groups[0][0] for groups in held]
    assert len(set(lrs)) > 2, "the rate never moved: the test would show nothing"
    assert_equal(ranks, alone(lrs=lrs, betas=[groups[0][1] for groups in held]))


LLAMA = [{"match": "embed_tokens|lm_head", "lr_scale": 4.0}, {"match": "norm", "weight_decay": 0.0}]


def llama_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """LLAMA as one would write it without lr_scale."""
    groups = parameter_groups(model, LLAMA)
    for group in groups:
        group["lr"] = trainer.ADAM["lr"] * group.pop("lr_scale", 1.0)  # type: ignore[operator]
        group.setdefault("weight_decay", trainer.ARGUMENTS["weight_decay"])
    return groups


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup", "deepspeed"])
def test_schedulers_of_hf_keep_it_under_the_trainer(ranks2: Ranks, tmp_path: Path, schedule: str) -> None:
    """Beside "auto" values, at stage 3: HF's schedulers scale each group's own rate, DeepSpeed's write one into all."""
    from transformers import get_scheduler

    def hf(optimizer: Any) -> Any:
        return get_scheduler(schedule, optimizer, trainer.ARGUMENTS["warmup_steps"], trainer.STEPS)

    def deepspeeds(optimizer: Any) -> Any:
        return Scaled(warmup_decay(optimizer), optimizer)

    of_deepspeed = schedule == "deepspeed"
    config = trainer.auto_config(3, scheduler=of_deepspeed, groups=LLAMA)
    arguments = {} if of_deepspeed else {"lr_scheduler_type": schedule}
    ranks = ranks2.run(trainer.train, str(tmp_path), config, arguments)
    check(ranks, trainer.alone(llama_groups, scheduler=deepspeeds if of_deepspeed else hf), f"groups, {schedule}")
    assert [group["weight_decay"] for group in ranks[0]["groups"]] == [0.2, 0.2, 0.0]
    assert len({group["lr"] for group in ranks[0]["groups"]}) == 1


class Scaled:
    """A scheduler that writes one lr into all groups, and the second group's factor after it."""

    def __init__(self, scheduler: Any, optimizer: Any) -> None:
        self._scheduler, self._optimizer = scheduler, optimizer
        self._scale()

    def step(self) -> None:
        self._scheduler.step()
        self._scale()

    def _scale(self) -> None:
        self._optimizer.param_groups[1]["lr"] = self._optimizer.param_groups[0]["lr"] * LLAMA[0]["lr_scale"]


def interrupted(mode: str, folder: str, tag: str | None, universal: bool = False) -> dict[str, Any]:
    """Save after four steps and go on; or load this tag into a run with other groups' values, and go on."""
    ds_config, zero_init = MODES[mode]
    others = [{**entry, "lr_scale": 7.0} for entry in GROUPS]
    ds_config = {**ds_config, "checkpoint": {"load_universal": universal}}
    started = start(ds_config, {"groups": GROUPS if tag is None else others}, zero_init)
    loaded = None
    if tag is not None:
        path, _ = started.load_checkpoint(folder, tag=tag)
        assert path is not None
        loaded = [(g["lr_scale"], g["weight_decay"]) for g in started.basic_optimizer.param_groups]
    seen = []
    for step, gradients in enumerate(given_gradients(10)):
        if tag is not None and step < 4:
            continue
        started.backward(started(gradients))
        started.step()
        seen.append(engine.observe(started.basic_optimizer))
        if tag is None and step == 3:
            started.save_checkpoint(folder, tag="saved")
    result = {"params": engine.masters(started), "seen": seen, "loaded": loaded}
    started.destroy()
    return result


@pytest.mark.parametrize("mode", ["zero0", "zero1", "zero2", "zero3", "zero3-init"])
def test_a_checkpoint_keeps_it(ranks2: Ranks, tmp_path: Path, mode: str) -> None:
    straight = ranks2.run(interrupted, mode, str(tmp_path), None)[0]
    resumed = ranks2.run(interrupted, mode, str(tmp_path), "saved")
    assert resumed[0]["loaded"] == [(1.0, 0.1), (4.0, 0.1), (0.3, 0.0)]
    assert_equal(resumed, {"params": straight["params"], "seen": straight["seen"][4:]})


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_a_universal_checkpoint_keeps_it(ranks2: Ranks, ranks1: Ranks, tmp_path: Path, mode: str) -> None:
    """On another number of ranks. One that was written before lr_scale goes on at 1, in every group."""
    straight = ranks2.run(interrupted, mode, str(tmp_path), None)[0]
    needs_universal_checkpoints(MODES[mode][0]["zero_optimization"]["stage"])
    convert(tmp_path)
    resumed = ranks1.run(interrupted, mode, str(tmp_path), "universal", universal=True)
    assert resumed[0]["loaded"] == [(1.0, 0.1), (4.0, 0.1), (0.3, 0.0)]
    assert_equal(resumed, {"params": straight["params"], "seen": straight["seen"][4:]})

    path = tmp_path / "universal" / "zero" / "optimizer_state.pt"
    held = torch.load(path, weights_only=False)
    for state in (held, held.get("optimizer_state_dict", {})):
        for group in state.get("param_groups", ()):
            group.pop("lr_scale", None)
    torch.save(held, path)
    old = ranks1.run(interrupted, mode, str(tmp_path), "universal", universal=True)
    assert old[0]["loaded"] == [(1.0, 0.1), (1.0, 0.1), (1.0, 0.0)]


class Square(Given):
    """Two parameters of one shape, which a load could not tell apart but for their names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = torch.nn.Parameter(torch.ones(16, 9)), torch.nn.Parameter(torch.ones(16, 9))


SCALED = {"weight": 2.0, "norm": 3.0, "bias|one": 5.0}


def reordered(folder: str, stage: int, order: list[str], tag: str | None = None) -> list[tuple[list[str], float]]:
    """A run that saves after a step, or loads this tag: the names in its groups and their lr_scale.

    ``order`` is that of the entries of SCALED.
    """
    ds_config = {**engine.config(stage), "checkpoint": {"load_universal": tag == "universal"}}
    entries = [{"match": word, "lr_scale": scale} for word, scale in SCALED.items()]
    options = {"groups": sorted(entries, key=lambda entry: order.index(str(entry["match"])))}
    started = engine.start(Square(), ds_config, options, client=False, optimizer="AlphaAdam")
    try:
        if tag is None:
            started.backward(started(given_gradients(1, like=Square())[0]))
            started.step()
            started.save_checkpoint(folder, tag="saved")
        else:
            started.load_checkpoint(folder, tag=tag)
        return [(group["param_names"], group["lr_scale"]) for group in started.basic_optimizer.param_groups]
    finally:
        started.destroy()


@pytest.mark.parametrize(("stage", "tag"), [(0, "saved"), (2, "universal"), (3, "universal")])
def test_entries_in_another_order_are_refused(ranks2: Ranks, tmp_path: Path, stage: int, tag: str) -> None:
    """Where no file says which part of the model it is. In others the ranks see it by that."""
    order = list(SCALED)
    groups = [(["embedding"], 1.0), (["weight"], 2.0), (["norm"], 3.0), (["bias", "one"], 5.0)]
    assert ranks2.run(reordered, str(tmp_path), stage, order)[0] == groups
    if tag == "universal":
        needs_universal_checkpoints(stage)
        convert(tmp_path)
    assert ranks2.run(reordered, str(tmp_path), stage, order, tag)[0] == groups
    for first, second, said in ((0, 1, "weight where this optimizer has norm"), (1, 2, "norm where .* has bias")):
        other = [*order]
        other[first], other[second] = order[second], order[first]
        with pytest.raises(Exception, match=f"has {said}: the same parameters in another order"):
            ranks2.run(reordered, str(tmp_path), stage, other, tag)


def frozen_alone(stage: int) -> None:
    from deepspeed import initialize

    model = Given()
    groups = parameter_groups(model, [{"match": "frozen", "lr_scale": 2.0}])
    initialize(model=model, config=engine.config(stage), optimizer=AlphaAdam(groups))[0].destroy()


def test_a_group_of_frozen_parameters_is_named_where_deepspeed_cannot_hold_it(ranks2: Ranks) -> None:
    for stage in (0, 3):
        ranks2.run(frozen_alone, stage)
    for stage in (1, 2):
        message = rf"parameter group 1, whose 1 parameters are frozen, at stage {stage}: .*leave this group"
        with pytest.raises(Exception, match=message):
            ranks2.run(frozen_alone, stage)


BAD = [
    ({"groups": [{"match": "nrom", "lr_scale": 2.0}]}, r"optimizer\.params\.groups\[0\] has match='nrom'.*like norm"),
    ({"groups": [{"match": "norm", "lr_scale": 0.0}]}, r"params\.groups\[0\]: lr_scale=0\.0 is out of range"),
    ({"groups": [{"match": "norm", "momentum": 0.5}]}, "has momentum=0.5, which a group of AlphaAdam does not have"),
    (
        {"groups": GROUPS, "no_decay": ["norm"]},
        r"groups and no_decay=\['norm'\]: give groups alone, with .*bias",
    ),
    ({"lr_scale": 2.0}, "AlphaAdam has no option 'lr_scale'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_mistake_is_named_at_the_start(ranks2: Ranks, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ranks2.run(start, engine.config(2), options)
