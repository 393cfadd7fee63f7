"""Every option that cannot be: refused at once, naming the field, the value and the way out."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD

from .problems import gradients, parameters_of, same_bits, step_with


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]


NAN, INF = math.nan, math.inf
BAD: list[tuple[dict[str, Any], str, str]] = [
    # options, "field=value" in the message, a word of the fix
    *[({"lr": v}, f"lr={v!r}", "0 or more") for v in (-1e-3, -INF, INF, NAN, "1e-3", None, True, [1e-3])],
    ({"lr": torch.tensor(-1.0)}, "lr=-1.0", "0 or more"),
    ({"lr": torch.tensor(NAN)}, "lr=nan", "0 or more"),
    ({"lr": torch.ones(2)}, "lr is a tensor of shape (2,)", "one element"),
    ({"lr": torch.ones(0)}, "lr is a tensor of shape (0,)", "one element"),
    *[({"eps": v}, f"eps={v!r}", "0 or more") for v in (-1e-8, NAN, INF, "0")],
    *[({"weight_decay": v}, f"weight_decay={v!r}", "0 or more") for v in (-0.1, NAN, INF, None)],
    ({"betas": (0.9,)}, "betas=(0.9,)", "two numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, "betas=(0.9, 0.99, 0.999)", "two numbers"),
    ({"betas": 0.9}, "betas=0.9", "two numbers"),
    ({"betas": None}, "betas=None", "two numbers"),
    ({"betas": (1.0, 0.999)}, "betas[0]=1.0", "less than 1"),
    ({"betas": (-0.1, 0.999)}, "betas[0]=-0.1", "at least 0"),
    ({"betas": (0.9, 1.0)}, "betas[1]=1.0", "less than 1"),
    ({"betas": (0.9, NAN)}, "betas[1]=nan", "less than 1"),
    ({"betas": (0.9, "0.999")}, "betas[1]='0.999'", "number"),
    *[({"lookahead": v}, f"lookahead={v!r}", "0 (none) or more") for v in (-0.1, NAN, INF, "0", None, True)],
    *[({"gamma": v}, f"gamma={v!r}", "between 0") for v in (-0.1, 1.1, NAN, INF, "0", None)],
    *[({"alpha_max": v}, f"alpha_max={v!r}", "1 or more") for v in (0.9, 0, -4.0, NAN, -INF, None)],
    *[({"threshold": v}, f"threshold={v!r}", "0 or more") for v in (-0.1, NAN, INF, "0.1", None)],
    *[({"alpha_warmup": v}, f"alpha_warmup={v!r}", "number of steps") for v in (-1, NAN, INF, "10", None)],
    *[({"scope": v}, f"scope={v!r}", "'global' or 'layer'") for v in ("model", "Global", None, 3)],
    *[({"sync": v}, f"sync={v!r}", "'exact' or 'delayed'") for v in ("async", "", None, True)],
    *[({"sharding": v}, f"sharding={v!r}", "'replicated' or 'sharded'") for v in ("fsdp", None, 1)],
    *[({"clip_norm": v}, f"clip_norm={v!r}", "more than 0") for v in (0, 0.0, -1.0, NAN, INF, "1")],
    ({"sync": "delayed", "scope": "layer"}, "sync='delayed' with scope='layer'", "scope='global'"),
    ({"sync": "delayed", "clip_norm": 1.0}, "sync='delayed' with clip_norm=1.0", "sync='exact'"),
    *[({"fused": v}, f"fused={v!r}", "None") for v in ("yes", "false", 0, 1, "auto")],
    *[({"maximize": v}, f"maximize={v!r}", "True or False") for v in ("false", "auto", "", 0, 1, None, [0], 1.0)],
    *[({"capturable": v}, f"capturable={v!r}", "True or False") for v in ("false", 0, None)],
    *[({"verify_every": v}, f"verify_every={v!r}", "whole number") for v in ("5", 5.0, True, -1, None)],
    ({"capturable": True}, "capturable=True", "a GPU"),
    ({"capturable": True, "sync": "delayed"}, "capturable=True", "sync='exact'"),
    ({"capturable": True, "fused": False}, "fused=False", "fused=None"),
    ({"capturable": True, "verify_every": 5}, "verify_every=5", "verify_every=0"),
    ({"capturable": True, "state_dtype": "bfloat16"}, "state_dtype='bfloat16'", "state_dtype=None"),
    *[({"state_dtype": v}, f"state_dtype={v!r}", "'bfloat16'") for v in ("bf16", "float32", "", 16, torch.float16)],
    *[({"rounding_seed": v}, f"rounding_seed={v!r}", "whole number") for v in (-1, 2**64, 0.5, "0", None, True)],
]


@pytest.mark.parametrize(("options", "named", "fix"), BAD, ids=[str(options) for options, _, _ in BAD])
def test_bad_options_are_refused_at_construction(options: dict[str, Any], named: str, fix: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        AlphaAdam(params(), **options)
    assert fix in str(refusal.value)


PER_GROUP = [(o, n, f) for o, n, f in BAD if next(iter(o)) in ("lr", "eps", "weight_decay", "betas")]


@pytest.mark.parametrize(("options", "named", "fix"), PER_GROUP, ids=[str(options) for options, _, _ in PER_GROUP])
def test_bad_hyperparameters_of_a_group_are_refused_and_nothing_is_added(
    options: dict[str, Any], named: str, fix: str
) -> None:
    first, second = params()
    with pytest.raises(ValueError, match=re.escape(named)):
        AlphaAdam([{"params": [first]}, {"params": [second], **options}])
    optimizer = AlphaAdam([first])
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        optimizer.add_param_group({"params": [second], **options})
    assert fix in str(refusal.value)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second]})
    step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0}, {"lr": 1}, {"lr": torch.tensor(1e-3)}, {"lr": torch.tensor([1e-3])}, {"lr": np.float64(1e-3)},
        {"eps": 0}, {"weight_decay": 0}, {"betas": (0, 0)}, {"betas": [0.9, 0.999]},
        {"gamma": 0}, {"gamma": 1}, {"alpha_max": 1}, {"alpha_max": INF}, {"threshold": 10.0}, {"alpha_warmup": 100},
        {"clip_norm": 1e-300}, {"fused": None}, {"fused": False}, {"fused": True}, {"capturable": False},
        {"sharding": "replicated"}, {"state_dtype": "bfloat16"}, {"state_dtype": torch.bfloat16},
        {"rounding_seed": 2**64 - 1}, {"rounding_seed": np.int64(3)},
    ],
    ids=str,
)  # fmt: skip
def test_options_at_their_bounds_are_taken(options: dict[str, Any]) -> None:
    optimizer = AlphaAdam(params(), **options)
    step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])
    assert optimizer.alpha == 1.0


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gama", "gamma"), ("learning_rate", None), ("weigth_decay", "weight_decay"), ("alphamax", "alpha_max"),
        ("thresh", "threshold"), ("clipnorm", "clip_norm"), ("amsgrad", None), ("foreach", None),
    ],
)  # fmt: skip
def test_unknown_options_are_refused_with_the_nearest_known_one(name: str, near: str | None) -> None:
    wrong: dict[str, Any] = {name: 0.5}
    with pytest.raises(TypeError, match=rf"AlphaAdam has no option '{name}' \(=0\.5\)") as refusal:
        AlphaAdam(params(), **wrong)
    message = str(refusal.value)
    assert "Options: " in message
    assert "gamma" in message
    assert (f"did you mean {near!r}?" if near else ": ") in message
    for internal in ("self", "params", "unknown", "alphaadam_state"):
        assert internal not in message.split("Options: ")[1].split(", ")


SHARED: dict[str, Any] = {
    "gamma": 0.5, "lookahead": 0.25, "alpha_max": 2.0, "threshold": 0.1, "alpha_warmup": 3, "scope": "layer",
    "sync": "delayed", "clip_norm": 1.0, "maximize": True, "capturable": True, "state_dtype": "bfloat16",
    "rounding_seed": 1, "skip_nonfinite": True, "telemetry": True,
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_a_group_that_contradicts_an_option_of_the_whole_optimizer(name: str) -> None:
    first, second = params()
    said = re.escape(f"{name}={SHARED[name]!r}") + r" in parameter group 1 contradicts " + name
    with pytest.raises(ValueError, match=said) as refusal:
        AlphaAdam([{"params": [first]}, {"params": [second], name: SHARED[name]}])
    assert "give it to AlphaAdam(...)" in str(refusal.value)

    optimizer = AlphaAdam([first])
    with pytest.raises(ValueError, match=said):
        optimizer.add_param_group({"params": [second], name: SHARED[name]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second], name: optimizer.defaults[name]})  # saying the same is no harm

    optimizer.param_groups[1][name] = SHARED[name]
    before = [p.detach().clone() for p in (first, second)]
    with pytest.raises(ValueError, match=said):
        step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])
    assert all(torch.equal(a, b) for a, b in zip(before, (first, second), strict=True))
    assert not optimizer.state
    optimizer.param_groups[1][name] = optimizer.defaults[name]
    step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])
    assert optimizer.agreement["agree"] == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("fused", True), ("amsgrad", True), ("sharding", "sharded"), ("decoupled_weight_decay", False)],
)
def test_what_no_group_can_ask_for_is_refused_rather_than_ignored(name: str, value: Any) -> None:
    first, second = params()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        AlphaAdam([{"params": [first]}, {"params": [second], name: value}])


def test_defaults_are_those_of_the_design() -> None:
    expected = {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "gamma": 0.0,
        "lookahead": 0.0, "alpha_max": 4.0, "threshold": 0.0, "alpha_warmup": 0, "scope": "global", "sync": "exact",
        "clip_norm": None, "fused": None, "capturable": False, "maximize": False,
    }  # fmt: skip
    optimizer = AlphaAdam(params())
    assert {name: optimizer.defaults[name] for name in expected} == expected
    assert (optimizer.sharding, optimizer.process_group) == ("auto", None)
    positional = AlphaAdam(params(), 2e-3, (0.8, 0.9), 1e-6, 0.3).defaults
    assert [positional[n] for n in ("lr", "betas", "eps", "weight_decay")] == [2e-3, (0.8, 0.9), 1e-6, 0.3]


def test_sharded_without_a_process_group_is_refused_at_construction_with_the_way_out() -> None:
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match=r"sharding='sharded'.*init_process_group"):
        AlphaAdam(params(), sharding="sharded")


# ---- numbers of other libraries

NUMBERS = ("lr", "eps", "weight_decay", "gamma", "lookahead", "alpha_max", "threshold", "alpha_warmup", "clip_norm")


class ListConfig(Sequence[float]):
    """A sequence that is neither a list nor a tuple, as the one of OmegaConf."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)


def is_plain(value: Any) -> bool:
    return type(value) in (bool, int, float, str, type(None)) or (type(value) is tuple and all(map(is_plain, value)))


def taken(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The one group, after checking that its values are Python's own and that a file of it needs no trust."""
    step_with(optimizer, [torch.ones(2, 2), torch.ones(3)])
    group = optimizer.param_groups[0]
    statistics = ("params", "alphaadam_state", "alphaadam_rounding")
    assert {name: value for name, value in group.items() if name not in statistics and not is_plain(value)} == {}
    assert all(name in statistics or is_plain(value) for name, value in optimizer.defaults.items())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)
    return group


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        np.float16(1), np.float32(1), np.float64(1), np.longdouble(1), np.int8(1), np.uint64(1), np.array(1.0),
        np.array([1]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.tensor([1.0], dtype=torch.bfloat16),
        Fraction(2, 2), Decimal("1.0"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_number_of_any_library_is_that_number(name: str, value: Any) -> None:
    if name == "lr" and isinstance(value, torch.Tensor):  # stays the tensor that a scheduler fills
        assert AlphaAdam(params(), lr=value).param_groups[0]["lr"] is value
        return
    group = taken(AlphaAdam(params(), **{name: value}))
    assert group[name] == 1
    first, second = params()
    optimizer = AlphaAdam([first], **{name: 1})
    optimizer.add_param_group({"params": [second], name: value})
    assert optimizer.param_groups[1][name] == 1
    assert is_plain(optimizer.param_groups[1][name])


def test_numbers_keep_their_value() -> None:
    third = np.float32(1) / np.float32(3)
    group = taken(AlphaAdam(params(), lr=third, eps=Fraction(1, 3), weight_decay=Decimal("0.1")))
    assert (group["lr"], group["eps"], group["weight_decay"]) == (float(third), 1 / 3, 0.1)


@pytest.mark.parametrize(
    "betas",
    [
        [0.5, 0.75], np.array([0.5, 0.75]), np.array([0.5, 0.75], dtype=np.float16), torch.tensor([0.5, 0.75]),
        ListConfig(0.5, 0.75), (np.float32(0.5), Decimal("0.75")), [torch.tensor(0.5), torch.tensor([0.75])],
    ],
    ids=lambda betas: type(betas).__name__,
)  # fmt: skip
@pytest.mark.parametrize("kind", [AlphaAdam, AlphaLion])
def test_betas_are_any_two_numbers_in_a_row(kind: Any, betas: Any) -> None:
    assert taken(kind(params(), betas=betas))["betas"] == (0.5, 0.75)


@pytest.mark.parametrize("betas", ["ab", b"ab", {0.5, 0.75}, {0.5: 1, 0.75: 2}, ListConfig(0.5), np.ones((2, 2)), 1j])
def test_what_is_no_row_of_two_numbers(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"betas.*number"):
        AlphaAdam(params(), betas=betas)


@pytest.mark.parametrize(
    "value", [1j, np.complex64(0.5), np.bool_(True), torch.tensor(True), torch.tensor(1j), "1", b"1"]
)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_real_number(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}(=.*| is a tensor.*): give .*number"):
        AlphaAdam(params(), **{name: value})


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, Fraction(10**400), 2**1024], ids=range(5))
@pytest.mark.parametrize("name", [*NUMBERS, "verify_every", "betas", "maximize", "fused", "momentum"])
def test_a_number_too_large_for_a_float_is_named_by_option(name: str, value: Any) -> None:
    kind: Any = AlphaSGD if name == "momentum" else AlphaAdam
    where = r"betas\[1\]" if name == "betas" else name
    with pytest.raises(ValueError, match=rf"^{where} is a number too large for a float"):
        kind(params(), **{name: (0.9, value) if name == "betas" else value})


@pytest.mark.parametrize("value", [np.True_, np.False_])
def test_numpys_bools_are_bools(value: Any) -> None:
    assert taken(AlphaAdam(params(), maximize=value, fused=value))["maximize"] is bool(value)
    assert taken(AlphaSGD(params(), nesterov=value))["nesterov"] is bool(value)


def test_what_a_scheduler_writes_is_the_number_too() -> None:
    """numpy's float32 would drag the step's arithmetic down to its precision, and a checkpoint's with it."""
    rate, decay = np.float32(1e-3), np.float32(0.3)
    theirs, ours = AlphaAdam(params(), lr=float(rate), weight_decay=float(decay)), AlphaAdam(params())
    ours.param_groups[0].update(lr=rate, weight_decay=decay, betas=[np.float64(0.9), 0.999])
    for grads in gradients(4, shapes=[(2, 2), (3,)]):
        step_with(ours, grads)
        step_with(theirs, grads)
    assert all(same_bits(p, q) for p, q in zip(parameters_of(ours), parameters_of(theirs), strict=True))
    assert all(is_plain(ours.state_dict()["param_groups"][0][name]) for name in ("lr", "weight_decay", "betas"))
    assert ours.param_groups[0]["lr"] is rate  # looking changes nothing


# ---- options that change nothing


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AlphaAdam, {"foreach": None, "differentiable": False, "amsgrad": False, "decoupled_weight_decay": True}),
        (AlphaAdam, {"_foreach": False, "foreach": False, "amsgrad": np.False_}),
        (AlphaAdam, {"torch_adam": True, "adam_w_mode": True}),
        (AlphaLion, {"amsgrad": False, "foreach": False}),
        (AlphaSGD, {"dampening": 0, "foreach": False}),
        (AlphaSGD, {"dampening": 0.0}),
    ],
)
def test_options_of_torch_that_change_nothing_are_let_through(kind: Any, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied, bare = kind(params(), **options), kind(params())
        first, second = params()
        kind([{"params": [first], **options}, {"params": [second]}])
    assert copied.defaults == bare.defaults
    for name in ("foreach", "amsgrad", "dampening"):
        assert copied.param_groups[0].get(name) == bare.param_groups[0].get(name)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *[(AlphaAdam, "amsgrad", v) for v in (True, "false", None)],
        *[(AlphaAdam, "foreach", v) for v in (True, "auto")],
        (AlphaAdam, "differentiable", True),
        (AlphaAdam, "adam_w_mode", False),
        (AlphaAdam, "decoupled_weight_decay", False),
        *[(AlphaSGD, "dampening", v) for v in (0.1, False, None)],
        (AlphaLion, "decoupled_weight_decay", True),  # of AdamW alone
    ],
)
def test_options_of_torch_that_would_change_something_are_refused_by_name(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no option '{name}' \(={value!r}\)"):
        kind(params(), **{name: value})
    if name in kind.fixed or name != "decoupled_weight_decay":
        with pytest.raises(ValueError, match=rf"{name}={value!r}: {kind.__name__} has no such option, remove it"):
            kind([{"params": params(), name: value}])


@pytest.mark.parametrize("fused", [None, True, False])
def test_fused_in_a_group_may_repeat_the_optimizers(fused: bool | None) -> None:
    first, second = params()
    optimizer = AlphaAdam([{"params": [first], "fused": fused}, {"params": [second]}], fused=fused)
    assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
    with pytest.raises(ValueError, match=r"fused=.* contradicts fused="):
        optimizer.add_param_group({"params": params(), "fused": not fused})
    assert len(optimizer.param_groups) == 2


# ---- keys of a group that nobody reads


@pytest.mark.parametrize(
    ("kind", "key", "name"),
    [
        (AlphaAdam, "weigth_decay", "weight_decay"), (AlphaAdam, "weightdecay", "weight_decay"),
        (AlphaAdam, "Weight-Decay", "weight_decay"), (AlphaAdam, "wd", "weight_decay"), (AlphaAdam, "LR", "lr"),
        (AlphaAdam, "learning_rate", "lr"), (AlphaAdam, "beta", "betas"), (AlphaAdam, "beta2", "betas"),
        (AlphaAdam, "epsilon", "eps"), (AlphaAdam, "gama", "gamma"), (AlphaAdam, "maximise", "maximize"),
        (AlphaSGD, "momentun", "momentum"), (AlphaSGD, "nestrov", "nesterov"), (AlphaLion, "treshold", "threshold"),
    ],
)  # fmt: skip
def test_a_misspelt_key_of_a_group_warns_once_with_the_nearest_option(kind: Any, key: str, name: str) -> None:
    groups = [{"params": [param], key: 0.5} for param in params()]
    with pytest.warns(UserWarning, match=rf"{key}=0\.5 .* no option of {kind.__name__}.*'{name}'\?") as said:
        optimizer = kind(groups)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": params()[:1], key: 0.5})


KEYS_OF_TOOLS = (
    "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "lr_mult", "wd_mult", "base_momentum",
    "max_momentum", "name", "layer", "layer_id", "group_name", "step", "bias_correction", "moe", "use_muon", "no_decay",
    "weight_decay_mult", "no_weight_decay", "layer_decay", "tag", "rank", "scale",
)  # fmt: skip


@pytest.mark.parametrize("kind", [AlphaAdam, AlphaLion, AlphaSGD])
def test_keys_that_tools_keep_in_groups_say_nothing(kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = kind([{"params": params(), **dict.fromkeys(KEYS_OF_TOOLS, 1.0)}])
        kind([{"params": [("a", params()[0])], "param_names": ["a"]}])
    assert {key: optimizer.param_groups[0][key] for key in KEYS_OF_TOOLS} == dict.fromkeys(KEYS_OF_TOOLS, 1.0)


def test_a_group_that_is_refused_for_any_reason_is_not_added() -> None:
    optimizer = AlphaAdam(params())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in ("weigth_decay", "lr", "process_group"):
            with pytest.raises((UserWarning, ValueError)):
                optimizer.add_param_group({"params": params(), key: "x"})
    assert len(optimizer.param_groups) == 1
