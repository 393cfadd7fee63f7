"""What AlphaAdam does not serve under DeepSpeed is refused by deepspeed.initialize: what, why and the way out."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam
from alphaadam_dist.zero import internals, registration
from tests.models import Given
from tests.older import since_deepspeed
from tests.ranks import RankError, Ranks
from tests.zero import engine

pytestmark = pytest.mark.usefixtures("fresh_ranks_afterwards")

BF16_STATES = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DeepCompile": (
        {**engine.config(3), "compile": {"deepcompile": True}},
        r"compile\.deepcompile=true: DeepCompile steps past the hooks that count: set it to false",
    ),
    "`torch_autocast`, fp16": (
        {**engine.config(2), "torch_autocast": {"enabled": True, "dtype": "float16"}},
        r"torch_autocast with dtype float16 at stage 2: .* use dtype bfloat16",
    ),
    "fp16 masters": (
        {**engine.config(2, offload=True), "fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        r"fp16\.fp16_master_weights_and_grads=true: .* set it to false",
    ),
    "bf16 states without `state_dtype`": (
        {**engine.offload(3), "bf16": BF16_STATES},
        r"bf16\.bf16_optimizer_states=true with state_dtype=None: .* set both flags to false",
    ),
    "SuperOffload": (
        engine.offload(3, super_offload=True),
        r"zero_optimization\.offload_optimizer\.super_offload=true: .* set it to false",
    ),
    "`offload_optimizer.ratio` below 1": (
        engine.offload(3, ratio=0.5),
        r"zero_optimization\.offload_optimizer\.ratio=0\.5: .* set ratio to 1\.0",
    ),
    "ZenFlow": (
        engine.config(2, offload=True, zenflow={"topk_ratio": 0.1, "update_interval": 4, "full_warm_up_rounds": 0}),
        r"zero_optimization\.zenflow: .* remove the section",
    ),
    "`elastic_checkpoint`": (
        engine.config(2, elastic_checkpoint=True),
        r"zero_optimization\.elastic_checkpoint=true: .* DeepSpeed saves no step .* set it to false",
    ),
    "`elastic_checkpoint` at stage 3": (
        engine.config(3, elastic_checkpoint=True),
        r"zero_optimization\.elastic_checkpoint=true: .* DeepSpeed saves no step .* set it to false",
    ),
}  # fmt: skip
SINCE = {"DeepCompile": "0.16.6", "`torch_autocast`, fp16": "0.17.2", "ZenFlow": "0.17.5", "SuperOffload": "0.18.0",
         "bf16 states without `state_dtype`": "0.18.3"}  # fmt: skip
"""The first DeepSpeed that knows what is refused; older ones ignore it, with every optimizer, or stop by themselves."""


def known(case: str) -> Any:
    marks = since_deepspeed(SINCE[case], "knows no such key") if case in SINCE else ()
    return pytest.param(case, marks=marks)


def initialize(ds_config: dict[str, Any], options: dict[str, Any], client: bool) -> None:
    engine.start(Given(), ds_config, options, client, "AlphaAdam")


@pytest.mark.slow
@pytest.mark.parametrize("client", [True, False], ids=["client", "json"])
@pytest.mark.parametrize("case", [known(case) for case in CONFIGS])
def test_config_is_refused(ranks2: Ranks, case: str, client: bool) -> None:
    config, message = CONFIGS[case]
    with pytest.raises(RankError, match=r"ValueError: AlphaAdam under DeepSpeed does not serve " + message):
        ranks2.run(initialize, config, {}, client)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_nonfinite": True}, r"optimizer\.params\.skip_nonfinite=true: DeepSpeed decides .*: remove it"),
        ({"clip_norm": 1.0}, r"optimizer\.params\.clip_norm=1\.0: .* set gradient_clipping in the DeepSpeed config"),
        ({"sharding": "sharded"}, r"sharding='sharded', process_group=None: .* leave both at their defaults"),
    ],
)
def test_option_is_refused(ranks2: Ranks, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        ranks2.run(initialize, engine.config(2), options, True)


def universal() -> None:
    config = {**engine.config(3), "checkpoint": {"load_universal": True}}
    with mock.patch.object(sys.modules["deepspeed"], "__version__", "0.15.4"):
        engine.start(Given(), config, {}, True, "AlphaAdam")


def test_universal_checkpoints_that_deepspeed_loads_in_part_are_refused(ranks2: Ranks) -> None:
    message = r"checkpoint\.load_universal=true with zero_optimization\.stage=3 under DeepSpeed 0\.15\.4: .*>=0\.18\.0"
    with pytest.raises(RankError, match=message):
        ranks2.run(universal)


def megatron(size: str) -> None:
    """An mpu of one data-parallel group, as Megatron passes it, that says it splits the model over two ranks."""
    import deepspeed
    import torch.distributed as dist

    one = SimpleNamespace(
        get_model_parallel_world_size=lambda: 1, get_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_world_size=lambda: 1, get_tensor_model_parallel_rank=lambda: 0,
        get_pipeline_model_parallel_world_size=lambda: 1, get_pipeline_model_parallel_rank=lambda: 0,
        get_data_parallel_world_size=dist.get_world_size, get_data_parallel_rank=dist.get_rank,
        get_data_parallel_group=lambda: dist.group.WORLD, get_model_parallel_group=lambda: dist.group.WORLD,
    )  # fmt: skip
    setattr(one, size, lambda: 2)
    model = Given()
    deepspeed.initialize(model=model, optimizer=AlphaAdam(model.parameters()), config=engine.config(1), mpu=one)


@pytest.mark.parametrize(
    ("size", "what"),
    [
        ("get_tensor_model_parallel_world_size", "the tensor parallelism of a client's mpu"),
        ("get_pipeline_model_parallel_world_size", "the pipeline parallelism of a client's mpu"),
    ],
)
def test_megatron_is_refused(ranks2: Ranks, size: str, what: str) -> None:
    with pytest.raises(RankError, match=f"does not serve {what}"):
        ranks2.run(megatron, size)


def step_in_backward(before: bool) -> None:
    model = Given()
    optimizer = AlphaAdam(model.named_parameters(), sync="delayed")
    if before:
        optimizer._run.in_backward = object()  # type: ignore[assignment]  # what step_in_backward puts there
    import deepspeed

    held, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine.config(2))
    optimizer.step_in_backward(held.module)


@pytest.mark.parametrize(
    ("before", "says"),
    [(True, "does not serve an optimizer that steps in backward: .* leave step_in_backward out"),
     (False, "step_in_backward under DeepSpeed is not served: .* Shard with FSDP2")],
)  # fmt: skip
def test_the_step_in_backward_is_refused(ranks2: Ranks, before: bool, says: str) -> None:
    with pytest.raises(RankError, match=says):
        ranks2.run(step_in_backward, before)


def test_a_swapped_optimizer_is_seen() -> None:
    """What Accelerate builds in AlphaAdam's place under offload keeps AlphaAdam's groups, and is told by them."""
    ours = AlphaAdam([nn.Parameter(torch.ones(3))])
    theirs = torch.optim.AdamW(ours.param_groups)
    with pytest.raises(ValueError, match=r"replaced by AdamW .* \"zero_force_ds_cpu_optimizer\": false"):
        registration.refuse_swapped(theirs)
    registration.refuse_swapped(torch.optim.AdamW([nn.Parameter(torch.ones(3))]))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"treshold": 0.1}, r"no option 'treshold' \(=0\.1\): did you mean 'threshold'\?"),
        ({"lr": -1e-3}, r"lr=-0\.001 is out of range: it must be 0 or more"),
        ({"gamma": 1.5}, r"gamma=1\.5 is out of range: it must be between 0"),
        ({"alpha_max": 0.5}, r"alpha_max=0\.5 is out of range: it must be 1 or more"),
        ({"scope": "model"}, r"scope='model' is unknown: give 'global' or 'layer'"),
        ({"sync": "late"}, r"sync='late' is unknown: give 'exact' or 'delayed'"),
        ({"sync": "delayed", "scope": "layer"}, r"sync='delayed' with scope='layer'"),
        ({"max_grad_norm": 1.0}, "no option 'max_grad_norm'"),
        ({"no_decay": ["bais"]}, r"no_decay has 'bais', which is in no parameter's name"),
        ({"no_decay": "bias"}, r"no_decay='bias': give a list of words"),
    ],
)
def test_bad_json_names_field_value_and_fix(ranks2: Ranks, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        ranks2.run(initialize, engine.config(2), params, False)


# ---- a DeepSpeed whose private names moved -----------------------------------------------------------------------


def test_the_installed_version_has_every_name() -> None:
    assert internals.missing_names() == []


def test_moved_names_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(internals.DeepSpeedZeroOptimizer, "unscale_and_clip_grads")
    monkeypatch.setitem(internals.CLASS_NAMES, "deepspeed.runtime.no_such_module", ("anything",))
    assert internals.missing_names() == [
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.unscale_and_clip_grads",
        "deepspeed.runtime.no_such_module",
    ]


def test_a_missing_attribute_is_named() -> None:
    wrapper = object.__new__(internals.DeepSpeedZeroOptimizer_Stage3)
    with pytest.raises(RuntimeError, match=r"no longer has .*Stage3\.averaged_gradients.*Install a tested version"):
        internals.check_instance(wrapper)


def unregistered(client: bool) -> None:
    """What a user sees whose DeepSpeed has lost a name: nothing at import, an error where AlphaAdam meets an engine."""
    engine_class = internals.DeepSpeedEngine
    names = ("_configure_basic_optimizer", "_configure_optimizer", "_do_optimizer_sanity_check", "__init__")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            method = getattr(engine_class, name)
            patch.setattr(engine_class, name, getattr(method, "__wrapped__", method))
        patch.setattr(internals, "missing_names", lambda: ["deepspeed.runtime.engine.DeepSpeedEngine._x"])
        patch.delattr(torch.optim, "AlphaAdam")
        registration.register(AlphaAdam)
        config = {**engine.config(2), "zero_allow_untested_optimizer": True}
        engine.start(Given(), config, {}, client, "AlphaAdam")


@pytest.mark.parametrize("client", [True, False], ids=["client", "json"])
def test_deepspeed_that_moved_is_refused(ranks2: Ranks, client: bool) -> None:
    with pytest.raises(
        RankError, match=r"RuntimeError: alphaadam_dist cannot run under DeepSpeed .* no longer has .*_x"
    ):
        ranks2.run(unregistered, client)
    ranks2.run(engine.given, engine.config(2), {}, steps=2)  # and all is as before
