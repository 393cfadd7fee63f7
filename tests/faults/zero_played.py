"""Plays a program under DeepSpeed's ZeRO, on a rank of a real process group: those events that ZeRO has too."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor, nn

import alphaadam_dist
from tests.zero import engine

from .expected import Expected
from .played import Compared, quietly
from .programs import Unit
from .rule_in_numpy import MOMENTS


def play(unit: Unit, trace: list[Expected], start: np.ndarray[Any, Any]) -> None:
    """On a rank. Raises AssertionError where it sees something else than the rule."""
    with quietly():
        player = ZeroPlayer(unit, start)
        try:
            for expected in trace:
                player.play(expected)
        finally:
            player.engine.destroy()


class Model(nn.Module):
    """Its loss has given gradients."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((getattr(self, name).float() * gradient).sum() for name, gradient in gradients.items())  # type: ignore[return-value]


class ZeroPlayer(Compared):
    def __init__(self, unit: Unit, start: np.ndarray[Any, Any]) -> None:
        self.unit, self.start, self.options = unit, start, unit.options
        self.where = f"rank {dist.get_rank()}"
        self.numbers = sorted(set(unit.group_of) - set(unit.late))
        self._start()

    def _start(self) -> None:
        unit, (stage, *more) = self.unit, self.unit.regime.removeprefix("zero").split("-")
        model = Model({name: value.clone() for name, value in self._by_name(self.start).items()})
        self.named = dict(model.named_parameters())
        options = {**unit.options, "fused": unit.fused, "verify_every": unit.verify_every}
        clip = options.pop("clip_norm")
        optimizer = getattr(alphaadam_dist, unit.kind)([self._group(number) for number in self.numbers], **options)
        config = engine.config(int(stage), "bf16" if "bf16" in more else "fp32", offload="offload" in more)
        config["gradient_clipping"] = clip or 0.0
        engine.get_accelerator().is_fp16_supported = lambda: True
        self.engine, *_ = engine.deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.optimizer, self.stepped = self.engine.basic_optimizer, False

    def _group(self, number: int) -> dict[str, Any]:
        of = dict(zip(self.unit.names, self.unit.group_of, strict=True))
        members = [(name, param) for name, param in self.named.items() if of[name] == number]
        return {"params": members, **self.unit.hyper[number]}

    def _by_name(self, flat: np.ndarray[Any, Any]) -> dict[str, Tensor]:
        sizes = [int(np.prod(shape)) for shape in self.unit.shapes]
        parts = torch.from_numpy(flat).float().split(sizes)
        return {n: p.view(s) for n, p, s in zip(self.unit.names, parts, self.unit.shapes, strict=True)}

    # ---- events

    def step(self, salt: int, absent: tuple[str, ...], zero: tuple[str, ...], sparse: float, by: str) -> None:
        assert self.expected.gradient is not None
        gradients = self._by_name(self.expected.gradient)
        self.engine.backward(self.engine({name: gradients[name] for name in self.expected.present}))
        self.engine.step()
        self.stepped = True

    def lr(self, group: int, value: float) -> None:
        if group in self.numbers:
            self.optimizer.param_groups[self.numbers.index(group)]["lr"] = value

    def add(self, group: int) -> None:
        self.numbers.append(group)
        self.optimizer.add_param_group(self._group(group))

    def reload(self, through: str, file: bool) -> None:
        """By DeepSpeed's own checkpoint, into a new engine."""
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        self.engine.save_checkpoint(folder[0], tag="saved")
        self.engine.destroy()
        self._start()
        path, _ = self.engine.load_checkpoint(folder[0], tag="saved")
        assert path is not None

    # ---- comparing

    def saved_groups(self, seen: Any) -> list[dict[str, Any]]:
        return []  # DeepSpeed's wrapper saves, and a checkpoint is loaded by ``reload``

    def compare(self) -> None:
        whole = engine.masters(self.engine)
        at = {name: index.long().view(-1) for name, index in self._by_name(np.arange(len(self.start))).items()}
        for name, param in self.engine.module.named_parameters():
            self.near("param", name, whole[name].view(-1), at[name])
            for moment in MOMENTS[self.unit.kind] if self.expected.t.get(name) else ():
                self.near(moment, name, self._moment(param, moment).view(-1), at[name])

    def _moment(self, param: nn.Parameter, moment: str) -> Tensor:
        if self.engine.zero_optimization_stage() > 0:
            if self.engine.zero_optimization_stage() < 3:  # DeepSpeed does it before all groups have a state
                self.engine.optimizer._hp_optimizer_states_linked = False
                self.engine.optimizer._lazy_init_hp_params_optimizer_state()
            return safe_get_full_optimizer_state(param, moment).float()
        master = engine.stage_zero_master(self.engine, param)
        return self.optimizer.state[master][moment]
