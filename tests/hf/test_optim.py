"""HF's Trainer takes our optimizers by name: from `optim`, or from the environment, whose word nothing passes over."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, parameter_groups
from alphaadam_dist.integrations import hf_trainer
from alphaadam_dist.training.trainer import FSDP2
from tests.hf import trainer
from tests.hf.test_trainer import check
from tests.marks import nightly_but
from tests.ranks import RankError, Ranks

NAMED = {"optim": "alphaadam", "optim_args": "gamma=0.1, sync=delayed"}
OPTIONS = {"gamma": 0.1, "sync": "delayed"}


def arguments(**given: Any) -> Any:
    """What of TrainingArguments is read."""
    fields = {"optim": "adamw_torch", "optim_args": None, "learning_rate": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9}
    return SimpleNamespace(**{**fields, "adam_epsilon": 1e-7, **given})


@pytest.mark.parametrize(
    ("name", "kind", "optim_args", "options"),
    [
        ("alphaadam", AlphaAdam, None, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-7}),
        ("alphalion", AlphaLion, "scope=layer", {"lr": 0.1, "betas": (0.8, 0.9), "scope": "layer"}),
        ("alphasgd", AlphaSGD, "momentum=0.5,nesterov=True", {"lr": 0.1, "momentum": 0.5, "nesterov": True}),
        ("alphaadam", AlphaAdam, "clip_norm=none, alpha_warmup=5,eps=1e-6",
         {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "clip_norm": None, "alpha_warmup": 5}),
    ],
)  # fmt: skip
def test_arguments_become_options(name: str, kind: Any, optim_args: str | None, options: dict[str, Any]) -> None:
    args = arguments(optim=name, optim_args=optim_args)
    assert hf_trainer.asked_for(args) is kind
    assert hf_trainer.options_of(kind, args) == options


def test_optim_args_of_another_form_are_named() -> None:
    with pytest.raises(ValueError, match=r"optim_args has 'gamma': write name=value"):
        hf_trainer.options_of(AlphaAdam, arguments(optim_args="gamma"))


def test_a_file_may_have_spaces_in_its_name() -> None:
    options = hf_trainer.options_of(AlphaAdam, arguments(optim_args="groups = my groups.json, gamma=0.5"))
    assert (options["groups"], options["gamma"]) == ("my groups.json", 0.5)


def test_a_decay_that_the_trainer_would_write_over_is_refused(tmp_path: Path) -> None:
    """With groups it is theirs."""
    choose = hf_trainer._chosen(lambda *_: None)
    given = {"optim": "alphaadam", "weight_decay": 0.1}
    with pytest.raises(ValueError, match=r"optim_args has weight_decay=0.3.*its own, 0.1.*--weight_decay"):
        choose(arguments(optim_args="weight_decay=0.3", **given), torch.nn.Linear(2, 2))
    file = tmp_path / "groups.json"
    file.write_text('[{"match": "bias", "weight_decay": 0.0}]')
    _, options = choose(arguments(optim_args=f"weight_decay=0.3,groups={file}", **given), torch.nn.Linear(2, 2))
    assert options["weight_decay"] == 0.3


@pytest.mark.parametrize(
    ("optim_args", "says"),
    [
        ("gamma=0.5,clip_norm=1", "optim_args has clip_norm=1, but this AlphaAdam trains with clip_norm=None"),
        ("eps=1e-6", "optim_args has eps=1e-06, but this AlphaAdam trains with eps=1e-08"),
        (
            "groups=groups.json",
            "optim_args has groups='groups.json', but this AlphaAdam trains with one parameter",
        ),
        ("gamma=0.5,state_dtype=bfloat16,eps=1e-8", None),
        ("gamma=0.5,foreach=False", None),
        (None, None),
    ],
)
def test_what_a_json_or_a_script_would_pass_over_is_refused(optim_args: str | None, says: str | None) -> None:
    """They bring an optimizer and never see `optim_args`."""
    optimizer = AlphaAdam([torch.nn.Parameter(torch.ones(2))], lr=0.1, gamma=0.5, state_dtype="bfloat16")
    callback, args = hf_trainer._callback(object)(), arguments(optim="alphaadam", optim_args=optim_args)
    if says is None:
        callback.on_train_begin(args, None, None, optimizer=optimizer)
    else:
        with pytest.raises(ValueError, match=f"{re.escape(says)}.*Write it there"):
            callback.on_train_begin(args, None, None, optimizer=optimizer)


def test_groups_need_a_model() -> None:
    """Tools with a create_optimizer of their own ask the Trainer for the class without one."""
    chosen = hf_trainer._chosen(lambda *_: None)
    with pytest.raises(ValueError, match=r"groups=groups\.json, but a create_optimizer .* without its model"):
        chosen(arguments(optim="alphaadam", optim_args="groups=groups.json"))


def test_the_environment_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hf_trainer.asked_for(arguments()) is None
    monkeypatch.setenv("ALPHAADAM_OPTIM", "AlphaLion")
    assert hf_trainer.asked_for(arguments(optim="alphaadam")) is AlphaLion
    monkeypatch.setenv("ALPHAADAM_OPTIM", "adamw")
    with pytest.raises(ValueError, match="ALPHAADAM_OPTIM='adamw' is unknown: give alphaadam, alphalion, alphasgd"):
        hf_trainer.asked_for(arguments())


def test_a_trainer_without_the_place_is_refused_where_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = ModuleType("transformers.trainer")
    hf_trainer._wrap(other)
    monkeypatch.setenv("ALPHAADAM_OPTIM", "alphaadam")
    with pytest.raises(RuntimeError, match=r"cannot be served: this version of Transformers has no Trainer"):
        hf_trainer._wrap(other)


PARSED = """
import sys
from transformers import HfArgumentParser, TrainingArguments
args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
    ["--output_dir", sys.argv[1], "--optim", "alphaadam", "--use_cpu"])
again = TrainingArguments(output_dir=sys.argv[1], use_cpu=True, optim="alphalion")
from transformers import Trainer
print(args.optim.value, again.optim.value, Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", nightly_but(["deepspeed", "transformers", "transformers.trainer"], every=3))
def test_the_name_passes_hfs_own_checks(tmp_path: Path, first: str) -> None:
    """Of argparse and of the dataclass, in a script that imports nothing of ours, whatever it imports first: the
    Trainer imports its arguments, so that ours would find it half-imported."""
    script = f"import {first}\n{PARSED}"
    line = [str(Path(sys.executable).with_name("alphaadam")), "run", "--", sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, env=environment)
    assert done.stdout.split()[-3:] == ["alphaadam", "alphalion", "AlphaAdam"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ddp", "fsdp2", "zero2"])
def test_named_in_the_arguments(ranks2: Ranks, tmp_path: Path, where: str) -> None:
    """Two groups, the options of optim_args, and alpha in the log without a callback of the script."""
    config = trainer.client_config(2) if where == "zero2" else None
    ranks = ranks2.run(trainer.train, str(tmp_path), config, {**NAMED, **(FSDP2 if where == "fsdp2" else {})})
    check(ranks, trainer.alone(trainer.hf_groups, OPTIONS), f"optim, {where}")
    assert [group["weight_decay"] for group in ranks[0]["groups"]] == [0.2, 0.0]
    logged = [entry["alpha"] for entry in ranks[0]["logs"] if "loss" in entry]
    assert logged == [alpha for alpha, _ in ranks[0]["seen"]]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ddp", "fsdp2", "zero2"])
def test_groups_in_a_file(ranks2: Ranks, tmp_path: Path, where: str) -> None:
    """In place of the Trainer's two groups; what no entry names has the arguments' decay."""
    entries = [{"match": "embed_tokens|lm_head", "lr_scale": 4.0}, {"match": "norm", "weight_decay": 0.0}]
    (tmp_path / "groups.json").write_text(json.dumps(entries))
    named = {"optim": "alphaadam", "optim_args": f"gamma=0.1, groups={tmp_path / 'groups.json'}"}
    config = trainer.client_config(2) if where == "zero2" else None
    ranks = ranks2.run(trainer.train, str(tmp_path), config, {**named, **(FSDP2 if where == "fsdp2" else {})})
    alone = trainer.alone(lambda model: parameter_groups(model, entries), {"gamma": 0.1, "weight_decay": 0.2})
    check(ranks, alone, f"groups, {where}")
    assert [group["weight_decay"] for group in ranks[0]["groups"]] == [0.2, 0.2, 0.0]


def without_default_callbacks(*args: Any, **kwargs: Any) -> Any:
    """As in a tool that has callbacks of its own in the place of HF's."""
    from transformers import trainer as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "DEFAULT_CALLBACKS", [theirs.DefaultFlowCallback])
        return trainer.train(*args, **kwargs)


@pytest.mark.slow
def test_a_tool_may_replace_the_default_callbacks(ranks2: Ranks, tmp_path: Path) -> None:
    for result in ranks2.run(without_default_callbacks, str(tmp_path), None, NAMED):
        assert all("alpha" in entry for entry in result["logs"] if "loss" in entry)


def train_asked(*args: Any, **kwargs: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPHAADAM_OPTIM", "alphaadam")
        return trainer.train(*args, **kwargs)


@pytest.mark.slow
def test_named_in_the_environment(ranks2: Ranks, tmp_path: Path) -> None:
    ranks = ranks2.run(train_asked, str(tmp_path), None, {"optim_args": NAMED["optim_args"]})
    check(ranks, trainer.alone(trainer.hf_groups, OPTIONS), "ALPHAADAM_OPTIM")


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["optim=alphaadam", "ALPHAADAM_OPTIM=alphaadam"])
def test_another_optimizer_in_the_json_is_refused(ranks2: Ranks, tmp_path: Path, asked: str) -> None:
    config = trainer.auto_config(2)
    config["optimizer"] = {"type": "SGD", "params": {"lr": "auto"}}  # torch's: nothing to compile
    config["zero_allow_untested_optimizer"] = True
    run, given = (trainer.train, {"optim": "alphaadam"}) if asked.startswith("optim") else (train_asked, {})
    with pytest.raises(RankError, match=rf"{asked} asks for AlphaAdam, but SGD would train"):
        ranks2.run(run, str(tmp_path), config, given)


@pytest.mark.slow
def test_the_json_may_name_it_in_any_case(ranks2: Ranks, tmp_path: Path) -> None:
    config = trainer.auto_config(2)
    config["optimizer"]["type"] = "alphaADAM"
    ranks = ranks2.run(trainer.train, str(tmp_path), config)
    check(ranks, trainer.alone(trainer.one_group), "json, any case")
