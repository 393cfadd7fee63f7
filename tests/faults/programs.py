"""Random programs: a model of any shapes in any groups, cut over ranks in any way, stepped, saved and loaded anywhere.

A program is data, and its tensors follow from its seed, so that every rank makes the same ones.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from alphaadam_dist import AlphaAdam, rule
from tests.zero import engine

from ..equality import pieces
from ..equality.given import mesh

THREADED = ("replicas", "fsdp2", "hsdp", "dtensors", "by-hand", "stages")


@dataclass(frozen=True)
class Program:
    """``group_of`` and ``late``: the group of each parameter, and whether the last group is added on the way."""

    regime: str
    world: int
    shapes: tuple[tuple[int, ...], ...]
    group_of: tuple[int, ...]
    hyper: tuple[dict[str, Any], ...]
    late: bool
    options: dict[str, Any]
    steps: int
    absent: float
    zeros: float
    reload_after: frozenset[int]
    seed: int

    @property
    def names(self) -> list[str]:
        return [f"p{i}" for i in range(len(self.shapes))]

    def values(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {n: torch.randn(s, generator=generator) for n, s in zip(self.names, self.shapes, strict=True)}

    def gradients(self) -> list[dict[str, Tensor | None]]:
        """For each step; drifting, exact in bf16, with zeros, some None, the late group's None until it is there."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        drift = {n: torch.randn(s, generator=generator) for n, s in zip(self.names, self.shapes, strict=True)}
        result = []
        for step in range(self.steps):
            grads: dict[str, Tensor | None] = {}
            for name, group in zip(self.names, self.group_of, strict=True):
                mean = drift[name]
                grad = (0.5 * mean + torch.randn(mean.shape, generator=generator)).bfloat16().float()
                grad[torch.rand(mean.shape, generator=generator) < self.zeros] = 0.0
                missing = float(torch.rand((), generator=generator)) < self.absent
                grads[name] = None if missing or group not in self.groups_at(step) else grad
            result.append(grads)
        return result

    def groups_at(self, step: int) -> list[int]:
        """The groups that the optimizer has at a step, ascending."""
        used = sorted(set(self.group_of))
        return used[:-1] if self.late and len(used) > 1 and step < 2 else used

    def group(self, number: int, named: dict[str, Tensor]) -> dict[str, Any]:
        held = [(n, named[n]) for n, g in zip(self.names, self.group_of, strict=True) if g == number and n in named]
        return {"params": held, **self.hyper[number]}


def programs(regimes: tuple[str, ...], worlds: tuple[int, ...]) -> st.SearchStrategy[Program]:
    return st.builds(_program, st.sampled_from(regimes), st.sampled_from(worlds), st.integers(0, 2**32), st.data())


def _program(regime: str, world: int, seed: int, data: st.DataObject) -> Program:
    draw = data.draw
    zero = regime.startswith("zero")
    shapes = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5))
    scope, sync = draw(st.sampled_from([("global", "exact"), ("layer", "exact"), ("global", "delayed")]))
    hyper = st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.0, 1e-3, 1e-2]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.99)]),
            "eps": st.sampled_from([1e-8, 1e-4]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    )
    options = {
        "scope": scope,
        "sync": sync,
        "gamma": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "threshold": draw(st.sampled_from([0.0, 1 / 9, 1.0])),
        "alpha_max": draw(st.sampled_from([1.2, 4.0])),
        "alpha_warmup": draw(st.sampled_from([0, 4])),
        "clip_norm": draw(st.sampled_from([None, 1.0])) if sync == "exact" and not zero else None,
        "maximize": draw(st.booleans()),
        "fused": draw(st.booleans()),
        "verify_every": draw(st.sampled_from([0, 1, 2])),
    }
    steps = draw(st.integers(2, 7))
    return Program(
        regime=regime,
        world=world,
        shapes=tuple(shapes),
        group_of=tuple(draw(st.lists(st.integers(0, 2), min_size=len(shapes), max_size=len(shapes)))),
        hyper=tuple(draw(st.lists(hyper, min_size=3, max_size=3))),
        late=not zero and regime != "stages" and draw(st.booleans()),  # every rank must add the group
        options=options,
        steps=steps,
        absent=0.0 if zero else draw(st.sampled_from([0.0, 0.3])),  # ZeRO makes zeros of missing gradients
        zeros=draw(st.sampled_from([0.0, 0.3, 1.0])),
        reload_after=frozenset(draw(st.sets(st.integers(0, steps - 1), max_size=2))),
        seed=seed,
    )


class Model(nn.Module):
    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((getattr(self, name) * gradient).sum() for name, gradient in gradients.items())  # type: ignore[return-value]


def shard(program: Program) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's parameters, and what the optimizer must be told about them."""
    values, world, chance = program.values(), program.world, random.Random(program.seed)
    if program.regime in ("fsdp2", "hsdp"):
        model = Model(values)
        replicas = chance.choice([n for n in (1, 2, 4) if world % n == 0])
        fully_shard(model, mesh=mesh(dp=world) if program.regime == "fsdp2" else mesh(r=replicas, s=world // replicas))
        return dict(model.named_parameters()), {}
    if program.regime == "dtensors":
        over = mesh(a=2, b=2) if world == 4 and chance.random() < 0.5 else mesh(a=world)
        for name, value in values.items():
            dims = [chance.choice([Replicate(), *(Shard(d) for d in range(value.ndim))]) for _ in range(over.ndim)]
            values[name] = distribute_tensor(value, over, dims, src_data_rank=None)
    elif program.regime == "by-hand":
        for name, value in values.items():
            cuts = sorted(chance.randint(0, value.numel()) for _ in range(world - 1))
            start, stop = ([0, *cuts][dist.get_rank()], [*cuts, value.numel()][dist.get_rank()])
            part = nn.Parameter(value.view(-1)[start:stop].clone())
            part.slice_of_whole = slice(start, stop)  # type: ignore[attr-defined]
            values[name] = part
        return values, {"sharding": "sharded"}
    elif program.regime == "stages":
        mine = dist.get_rank()
        values = {n: v for i, (n, v) in enumerate(values.items()) if i % world == mine or i == 0}
        return {n: nn.Parameter(v) for n, v in values.items()}, {"process_group": dist.group.WORLD}
    return {n: nn.Parameter(v) for n, v in values.items()}, {}


def run(program: Program, *, alone: bool = False) -> dict[str, Any]:
    """On a rank, or alone and whole and without saving: alphas and counts of every step, and the parameters."""
    whole = {n: nn.Parameter(v) for n, v in program.values().items()}
    named, extra = (whole, {}) if alone else shard(program)

    def build(numbers: list[int]) -> AlphaAdam:
        groups = [program.group(number, named) for number in numbers]
        return AlphaAdam([g for g in groups if g["params"]], **program.options, **extra)

    optimizer = build(program.groups_at(0))
    seen = []
    for step, gradients in enumerate(program.gradients()):
        for number in set(program.groups_at(step)) - set(program.groups_at(step - 1)) if step else ():
            group = program.group(number, named)
            if group["params"]:
                optimizer.add_param_group(group)
        for name, param in named.items():
            gradient = gradients[name]
            param.grad = None if gradient is None else pieces.local_part(gradient, param)
        optimizer.step()
        seen.append((optimizer.alpha, optimizer.agreement["agree"], optimizer.agreement["conflict"]))
        if step in program.reload_after and not alone:
            saved, optimizer = optimizer.state_dict(), build(program.groups_at(step))
            optimizer.load_state_dict(saved)
    shapes = {n: torch.Size(s) for n, s in zip(program.names, program.shapes, strict=True)}
    return {"seen": seen, "params": pieces.pieces(named.items(), shapes, {p: p for p in named.values()})}


def run_rule(program: Program) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """The definition itself: the counts of every step that had evidence, and the parameters."""
    options = {key: value for key, value in program.options.items() if key not in ("verify_every", "fused")}
    model = {
        name: rule.Coordinates(
            value, [torch.zeros_like(value), torch.zeros_like(value)], {**program.hyper[group], "step": 0.0}
        )
        for (name, value), group in zip(program.values().items(), program.group_of, strict=True)
    }
    memory, counts = rule.Memory(), []
    for gradients in program.gradients():
        rule.step_(list(model.values()), [gradients[name] for name in model], memory, **options)
        counts.append((memory.agree, memory.conflict))
    return counts, {name: c.param for name, c in model.items()}


def run_zero(program: Program) -> dict[str, Any]:
    """On a rank of a real process group: the program under DeepSpeed, saved and loaded by it."""
    stage = int(program.regime.removeprefix("zero"))

    def start() -> Any:
        model = Model(program.values())
        groups = [program.group(number, dict(model.named_parameters())) for number in program.groups_at(0)]
        started, *_ = engine.deepspeed.initialize(
            model=model, optimizer=AlphaAdam(groups, **program.options), config=engine.config(stage)
        )
        return started

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    started, seen = start(), []
    for step, gradients in enumerate(program.gradients()):
        started.backward(started(gradients))
        started.step()
        optimizer = started.basic_optimizer
        seen.append((optimizer.alpha, optimizer.agreement["agree"], optimizer.agreement["conflict"]))
        if step in program.reload_after:
            started.save_checkpoint(folder[0], tag=str(step))
            started.destroy()
            started = start()
            path, _ = started.load_checkpoint(folder[0], tag=str(step))
            assert path is not None
    result = {"seen": seen, "params": engine.masters(started)}
    started.destroy()
    return result
