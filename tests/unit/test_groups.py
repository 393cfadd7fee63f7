"""Parameter groups by name, and lr_scale: the rate of a group that no scheduler writes over."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, groups, parameter_groups, rule
from alphaadam_dist.optimizer import AlphaOptimizer

from .. import threads
from ..models import Given, given_gradients
from ..ranks import RankError
from .problems import same_bits

KINDS: list[type[AlphaOptimizer]] = [AlphaAdam, AlphaLion, AlphaSGD]
ENTRIES: list[dict[str, Any]] = [
    {"match": "embedding|^one$", "lr_scale": 4.0},
    {"match": "norm|bias", "weight_decay": 0.0, "lr_scale": 0.3},
]
LR = 1e-2


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))


def names_of(made: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in made]


# ---- which parameters are in which group


def test_the_first_match_wins_and_the_rest_come_first() -> None:
    model = Given()
    made = parameter_groups(
        model, [{"match": "norm", "lr_scale": 2}, {"match": "n", "weight_decay": 0.0}, {"match": "^w", "lr": 1e-3}]
    )
    assert names_of(made) == [["bias"], ["norm"], ["embedding", "frozen", "one"], ["weight"]]
    assert [{key: value for key, value in group.items() if key != "params"} for group in made] == [
        {}, {"lr_scale": 2}, {"weight_decay": 0.0}, {"lr": 1e-3},
    ]  # fmt: skip
    of_groups = [param for group in made for _, param in group["params"]]
    assert {id(param) for param in of_groups} == {id(param) for param in model.parameters()}
    assert len(of_groups) == len(list(model.parameters()))


def test_no_group_is_empty() -> None:
    made = parameter_groups(block(), [{"match": ".", "lr": 1.0}])
    assert names_of(made) == [["0.weight", "0.bias", "1.weight", "1.bias"]]


@pytest.mark.parametrize("name", ["embedding", "tied"])
def test_any_name_of_a_tied_parameter_counts(name: str) -> None:
    assert names_of(parameter_groups(Given(), [{"match": f"^{name}$", "lr_scale": 2.0}]))[1] == ["embedding"]


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        checkpoint_wrapper,
        lambda model: nn.ModuleDict({"module": model}),  # as DDP names it
        lambda model: nn.Sequential(checkpoint_wrapper(model[0]), torch.compile(model[1])),
    ],
)
def test_names_are_the_bare_models(wrap: Any) -> None:
    made = parameter_groups(wrap(block()), [{"match": "^1[.]", "weight_decay": 0.0}])
    assert names_of(made) == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]


# ---- what is refused


BAD: list[tuple[Any, str]] = [
    ([], r"groups=\[\]: give a list of entries, as in"),
    ("norm", "groups='norm': give a list of entries"),
    ({"match": "norm"}, r"groups=\{'match': 'norm'\}: give a list of entries"),
    (["norm"], r"groups\[0\]='norm': write an entry"),
    ([{"weight_decay": 0.0}], r"groups\[0\] has match=None: give a regular expression"),
    ([{"match": "", "lr": 1.0}], r"groups\[0\] has match='': give a regular expression"),
    ([{"match": ["norm"], "lr": 1.0}], r"groups\[0\] has match=\['norm'\]: give a regular expression"),
    ([{"match": "(norm", "lr": 1.0}], r"groups\[0\] has match='\(norm', which is no regular expression.*correct it"),
    ([{"match": "norm"}], r"groups\[0\] has match='norm' and nothing that its parameters should have: add one of"),
    ([{"match": "norm", "lr_scal": 2.0}], r"groups\[0\] has lr_scal=2.0, .*AlphaAdam does not have: .*'lr_scale'\?"),
    ([{"match": "norm", "momentum": 0.9}], r"has momentum=0.9, which a group of AlphaAdam does not have: remove it"),
    ([{"match": "norm", "gamma": 0.5}], r"has gamma=0.5, which a group of AlphaAdam does not have"),
    ([{"match": "norm", "params": []}], r"has params=\[\]"),
    ([{"match": "one", "lr": 1.0}, {"match": "norm", "lr_scale": 0}], r"groups\[1\]: lr_scale=0 is out of range"),
    ([{"match": "norm", "lr_scale": -1.0}], "lr_scale=-1.0 is out of range: it must be more than 0"),
    ([{"match": "norm", "lr_scale": math.inf}], "lr_scale=inf is out of range"),
    ([{"match": "norm", "lr_scale": math.nan}], "lr_scale=nan is out of range"),
    ([{"match": "norm", "lr_scale": "4"}], "lr_scale='4' is a str: give a number"),
    ([{"match": "norm", "lr_scale": True}], "lr_scale=True is a bool: give a number"),
    ([{"match": "norm", "weight_decay": "auto"}], "weight_decay='auto' is a str: give a number"),
    ([{"match": "norm", "betas": 0.9}], r"groups\[0\]: betas=0.9: give two numbers"),
    ([{"match": "nrom", "lr": 1.0}], r"match='nrom', which is in no parameter's name: correct.*like norm$"),
    ([{"match": "lm_haed|xyz", "lr": 1.0}], r"in no parameter's name.*like bias, embedding, frozen, norm, one$"),
    (
        [{"match": "norm", "lr": 1.0}, {"match": "bias|one", "lr": 2.0}, {"match": "no|bi", "lr": 3.0}],
        r"groups\[2\] has match='no\|bi', but all that it matches is taken before it "
        r"\(groups\[0\] has match='norm' and groups\[1\] has match='bias\|one'\), and the first match wins: put it "
        "before them, or remove it",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_mistake_is_named_with_its_value_and_what_to_do(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(Given(), given)


def test_the_hyperparameters_are_those_of_the_optimizer() -> None:
    made = parameter_groups(Given(), [{"match": "norm", "momentum": 0.5, "nesterov": True}], AlphaSGD)
    assert (made[1]["momentum"], made[1]["nesterov"]) == (0.5, True)
    with pytest.raises(ValueError, match=r"momentum=1.5 is out of range"):
        parameter_groups(Given(), [{"match": "norm", "momentum": 1.5}], AlphaSGD)
    with pytest.raises(ValueError, match="eps=1e-08, which a group of AlphaLion does not have"):
        parameter_groups(Given(), [{"match": "norm", "eps": 1e-8}], AlphaLion)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(ENTRIES))
    assert groups.read_file(path) == ENTRIES
    path.write_text(json.dumps([{"match": "norm", "lr_scale": 0}]))
    with pytest.raises(ValueError, match=r"groups\.json: groups\[0\]: lr_scale=0 is out of range"):
        groups.read_file(path)
    path.write_text(json.dumps(ENTRIES)[:-3])
    with pytest.raises(ValueError, match=r"groups\.json is cut short or no JSON .*write a list there, as in \[\{"):
        groups.read_file(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"groups\.json: groups=\{\}: give a list of entries"):
        groups.read_file(path)


# ---- lr_scale in the step


def train(optimizer: AlphaOptimizer, model: nn.Module, steps: int = 6, first: int = 0) -> None:
    for gradients in given_gradients(steps)[first:]:
        for name, param in model.named_parameters():
            param.grad = gradients[name].clone() if name in gradients else None
        optimizer.step()


def by_hand(kind: type[AlphaOptimizer], model: nn.Module, **options: Any) -> AlphaOptimizer:
    """ENTRIES as one would write them without lr_scale."""
    named = {name: (name, param) for name, param in model.named_parameters()}
    lr = options.pop("lr", LR)
    parts = [
        {"params": [named["weight"], named["frozen"]]},
        {"params": [named["embedding"], named["one"]], "lr": lr * 4.0},
        {"params": [named["norm"], named["bias"]], "lr": lr * 0.3, "weight_decay": 0.0},
    ]
    return kind(parts, lr=lr, **{"weight_decay": 0.1, **options})


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"fused": False},
    "fast": {"fused": True},
    "delayed": {"fused": False, "sync": "delayed"},
    "layer": {"fused": True, "scope": "layer"},
    "bf16-state": {"fused": False, "state_dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_rate_is_lr_times_lr_scale_wherever_it_is_used(kind: type[AlphaOptimizer], options: str) -> None:
    ours, theirs = Given(), Given()
    optimizer = kind(parameter_groups(ours, ENTRIES, kind), lr=LR, weight_decay=0.1, **OPTIONS[options])
    train(optimizer, ours)
    train(by_hand(kind, theirs, **OPTIONS[options]), theirs)
    assert equal(ours, theirs)
    assert [group["lr"] for group in optimizer.param_groups] == [LR] * 3
    plain = Given()
    train(kind(plain.named_parameters(), lr=LR, weight_decay=0.1, **OPTIONS[options]), plain)
    assert not equal(ours, plain)


def test_it_is_the_rule() -> None:
    """rule.step_ with the multiplied rates, decay included."""
    model, scales = Given(), {"embedding": 4.0, "one": 4.0, "norm": 0.3, "bias": 0.3}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    written = [
        rule.Coordinates(
            p.detach().clone(), [torch.zeros_like(p), torch.zeros_like(p)],
            {"lr": LR * scales.get(n, 1.0), "betas": (0.9, 0.999), "eps": 1e-8, "step": 0.0,
             "weight_decay": 0.0 if n in ("norm", "bias") else 0.1},
        )
        for n, p in named
    ]  # fmt: skip
    memory = rule.Memory()
    for gradients in given_gradients(6):
        rule.step_(written, [gradients[n] for n, _ in named], memory)
    train(AlphaAdam(parameter_groups(model, ENTRIES), lr=LR, weight_decay=0.1, fused=False), model)
    for (name, param), c in zip(named, written, strict=True):
        assert same_bits(param.detach(), c.param), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_rate_that_is_a_tensor(dtype: torch.dtype) -> None:
    """It stays the one that the user holds, and a change of it is seen."""
    ours, theirs = Given(), Given()
    lr = torch.tensor(LR, dtype=dtype)
    optimizer = AlphaAdam(parameter_groups(ours, ENTRIES), lr=lr, weight_decay=0.1, fused=False)
    train(optimizer, ours, 3)
    lr.fill_(3 * LR)
    train(optimizer, ours, 6, first=3)
    hand = by_hand(AlphaAdam, theirs, fused=False)
    for rate, first, last in ((LR, 0, 3), (3 * LR, 3, 6)):
        read = rule.rate(torch.tensor(rate, dtype=dtype))
        for group, scale in zip(hand.param_groups, (1.0, 4.0, 0.3), strict=True):
            group["lr"] = read * scale
        train(hand, theirs, last, first)
    assert equal(ours, theirs)
    assert all(group["lr"] is lr for group in optimizer.param_groups)


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR), torch.tensor(LR, dtype=torch.bfloat16)])
def test_at_one_the_rate_is_not_touched(lr: float | Tensor) -> None:
    assert rule.scaled(lr, 1.0) is lr
    assert AlphaAdam(Given().parameters()).param_groups[0]["lr_scale"] == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=20),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, cycle_momentum=False),
    ],
    ids=["lambda", "one-cycle", "cosine", "cyclic"],
)
def test_torchs_schedulers_keep_it(schedule: Any) -> None:
    ours, theirs = Given(), Given()
    optimizer = AlphaAdam(parameter_groups(ours, ENTRIES), lr=LR, weight_decay=0.1)
    hand = by_hand(AlphaAdam, theirs)
    scheduler = schedule(optimizer)
    for step in range(6):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert len(set(rates)) == 1
        for group, scale, own in zip(hand.param_groups, (1.0, 4.0, 0.3), optimizer.param_groups, strict=True):
            group["lr"], group["betas"] = rates[0] * scale, own["betas"]
        train(optimizer, ours, step + 1, step)
        train(hand, theirs, step + 1, step)
        scheduler.step()
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 4.0, 0.3]
    assert equal(ours, theirs)


def test_a_group_that_is_added_has_its_own() -> None:
    model = Given()
    optimizer = AlphaAdam([model.weight], lr=LR)
    optimizer.add_param_group({"params": [model.norm], "lr_scale": 2})
    optimizer.add_param_group({"params": [model.bias]})
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 2, 1.0]
    with pytest.raises(ValueError, match="lr_scale=0 is out of range: it must be more than 0"):
        optimizer.add_param_group({"params": [model.one], "lr_scale": 0})
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize("value", [0, -1.0, math.nan, None])
def test_one_that_somebody_puts_out_of_range_is_named_by_the_step(value: Any) -> None:
    model = Given()
    optimizer = AlphaAdam(parameter_groups(model, ENTRIES), lr=LR)
    before = copy.deepcopy(model)
    optimizer.param_groups[1]["lr_scale"] = value
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['lr_scale'\]=.*it must be more than 0, .*lr is 0"):
        train(optimizer, model, 1)
    assert equal(model, before)
    optimizer.param_groups[1]["lr_scale"] = 4.0
    train(optimizer, model, 1)


# ---- a scheduler that multiplies by a key of the same name


def test_rates_that_somebody_has_multiplied_already_are_refused() -> None:
    """As timm's schedulers do, and MAE's and BEiT's scripts."""
    model = Given()
    optimizer = AlphaAdam(parameter_groups(model, ENTRIES), lr=LR)
    before = copy.deepcopy(model)
    for lr in (0.0, 1e-4):  # a warm-up from 0 shows nothing in its first step
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if lr == 0:
            train(optimizer, model, 1)
    with pytest.raises(
        ValueError, match=r"rates .*\(0\.0001, 0\.0004, 3e-05\) .*lr_scale \(1, 4, 0\.3\).*again.*same lr"
    ):
        train(optimizer, model, 2, 1)
    assert equal(model, before)
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    train(optimizer, model, 2, 1)


# ---- checkpoints


def made(seed: int = 0, entries: Any = ENTRIES) -> tuple[nn.Module, AlphaAdam]:
    model = Given()
    return model, AlphaAdam(parameter_groups(model, entries), lr=LR, weight_decay=0.1)


@pytest.mark.parametrize(
    "through",
    [
        lambda optimizer, other: other.load_state_dict(copy.deepcopy(optimizer.state_dict())) or other,
        lambda optimizer, other: pickle.loads(pickle.dumps(optimizer)),
        lambda optimizer, other: copy.deepcopy(optimizer),
    ],
    ids=["state_dict", "pickle", "deepcopy"],
)
def test_it_is_saved_and_loaded(through: Any) -> None:
    model, optimizer = made()
    train(optimizer, model, 3)
    found = through(optimizer, made(entries=[{**entry, "lr_scale": 7.0} for entry in ENTRIES])[1])
    assert [group["lr_scale"] for group in found.param_groups] == [1.0, 4.0, 0.3]


def without(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "param_groups": [{k: v for k, v in g.items() if k != "lr_scale"} for g in state["param_groups"]]}


def test_a_checkpoint_without_it_goes_on_at_one_and_says_so() -> None:
    model, optimizer = made()
    train(optimizer, model, 3)
    old = without(copy.deepcopy(optimizer.state_dict()))
    with pytest.warns(UserWarning, match=r"has no lr_scale.*\['lr_scale'\] after loading") as said:
        optimizer.load_state_dict(old)
    assert sorted({str(w.message).split("not at the ")[1].split(" ")[0] for w in said}) == ["0.3", "4.0"]
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0] * 3


@pytest.mark.filterwarnings("error")
def test_an_older_checkpoint_or_pickle_or_adamws_loads_without_a_word() -> None:
    model = Given()
    theirs = torch.optim.AdamW(model.named_parameters(), lr=LR)
    optimizer = AlphaAdam(model.named_parameters(), lr=LR)
    train(optimizer, model, 2)
    optimizer.load_state_dict(without(copy.deepcopy(optimizer.state_dict())))
    assert optimizer.param_groups[0]["lr_scale"] == 1.0
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["lr_scale"] == 1.0
    state = optimizer.__getstate__()
    del state["defaults"]["lr_scale"], state["param_groups"][0]["lr_scale"]
    old = AlphaAdam.__new__(AlphaAdam)
    old.__setstate__(state)
    assert old.param_groups[0]["lr_scale"] == old.defaults["lr_scale"] == 1.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "x"])
def test_a_damaged_one_is_refused(value: Any) -> None:
    _, optimizer = made()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][1]["lr_scale"] = value
    with pytest.raises(ValueError, match=r"parameter group 1 of the checkpoint: lr_scale="):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[1]["lr_scale"] == 4.0


class Square(nn.Module):
    """Two parameters of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))


def of_square(*order: str) -> tuple[nn.Module, AlphaAdam]:
    model = Square()
    optimizer = AlphaAdam(parameter_groups(model, [{"match": word, "lr_scale": 2.0} for word in order]), lr=LR)
    for scale, (_, param) in enumerate(model.named_parameters(), start=1):
        param.grad = torch.full((3, 3), float(scale))
    return model, optimizer


def test_entries_in_another_order_are_refused() -> None:
    """Each parameter would go on with the other's moments, and no shape tells."""
    _, saved = of_square("query", "value")
    saved.step()
    state = copy.deepcopy(saved.state_dict())
    for group in state["param_groups"]:  # as DDP calls them
        group["param_names"] = [f"module.{name}" for name in group["param_names"]]
    _, optimizer = of_square("value", "query")
    with pytest.raises(ValueError, match=r"group 0 of the checkpoint has query where this optimizer has value: .*"):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    same_order = of_square("query", "value")[1]
    same_order.load_state_dict(state)
    for group, name in zip(state["param_groups"], ("key", "output"), strict=True):
        group["param_names"] = [name]
    same_order.load_state_dict(state)  # another model's names say nothing


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_goes_by_names_whatever_the_order_of_entries() -> None:
    model, saved = of_square("query", "value")
    saved.step()
    other, optimizer = of_square("value", "query")
    set_optimizer_state_dict(other, optimizer, get_optimizer_state_dict(model, saved))
    for name in ("query", "value"):
        ours, theirs = optimizer.state[getattr(other, name)], saved.state[getattr(model, name)]
        assert same_bits(ours["exp_avg"], theirs["exp_avg"]), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_names_stay_with_their_parameters_through_dcp() -> None:
    """The random bits of bf16 state come from the names: a run goes on with them, whatever the order."""

    def new(backwards: bool) -> tuple[nn.Module, AlphaAdam]:
        model, order = Square(), slice(None, None, -1 if backwards else 1)
        return model, AlphaAdam(list(model.named_parameters())[order], lr=LR, state_dtype="bfloat16", fused=False)

    def step(model: nn.Module, optimizer: AlphaAdam) -> None:
        for seed, (_, param) in enumerate(model.named_parameters()):
            param.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    model, optimizer = new(False)
    step(model, optimizer)
    other, resumed = new(True)
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(model.state_dict())
    assert resumed.param_groups[0]["param_names"] == ["value", "query"]
    step(model, optimizer)
    step(other, resumed)
    for name in ("query", "value"):
        ours, theirs = resumed.state[getattr(other, name)], optimizer.state[getattr(model, name)]
        assert all(same_bits(ours[moment], theirs[moment]) for moment in ("exp_avg", "exp_avg_sq")), name


# ---- ranks that disagree


def disagree() -> None:
    model = Given()
    scale = 4.0 if torch.distributed.get_rank() else 2.0
    optimizer = AlphaAdam(parameter_groups(model, [{"match": "norm", "lr_scale": scale}]), verify_every=1)
    train(optimizer, model, 1)


def test_verify_every_compares_it() -> None:
    with pytest.raises(RankError, match=r"lr_scale of group 1 is 2\.0 on rank 0 but 4\.0 on rank 1"):
        threads.run(2, disagree)


# ---- DCP


def in_dcp(model: nn.Module, optimizer: AlphaAdam) -> dict[str, Any]:
    return {"optimizer": get_optimizer_state_dict(model, optimizer)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_keeps_it_and_what_it_lacks_stays(tmp_path: Path) -> None:
    model, optimizer = made()
    train(optimizer, model, 3)
    state = in_dcp(model, optimizer)
    dcp.save(state, checkpoint_id=tmp_path / "new")
    for group in state["optimizer"]["param_groups"]:
        del group["lr_scale"]
    dcp.save(state, checkpoint_id=tmp_path / "old")

    others = [{**entry, "lr_scale": 7.0} for entry in ENTRIES]
    for name, scales in (("new", [1.0, 4.0, 0.3]), ("old", [1.0, 7.0, 7.0])):
        model, optimizer = made(entries=others)
        state = in_dcp(model, optimizer)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=name == "old")
        dcp.load(state, checkpoint_id=tmp_path / name, planner=planner)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert [group["lr_scale"] for group in optimizer.param_groups] == scales
        assert float(optimizer.state[model.norm]["step"]) == 3
