"""Makes deepspeed.initialize take our optimizers, from its JSON or as client objects, and count the whole model.

``register`` runs at ``import alphaadam_dist``. It names each optimizer under torch.optim, where DeepSpeed looks up the
type in a JSON config, lists it among those that ZeRO supports, and once wraps three methods of the engine: one builds
the optimizer named in the JSON, one refuses what is not served before DeepSpeed wraps anything around the optimizer,
and one attaches to that wrapper once it stands.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from .. import replicas
from ..kernels import agreement
from ..optimizer import AlphaOptimizer
from ..ownership import Layout, build_layout, statistics_device
from . import internals, json_config, monitor, refusals, universal


def register(*kinds: type[AlphaOptimizer]) -> None:
    """Register optimizer classes with DeepSpeed, under their names. What is registered already stays as it is."""
    missing = internals.missing_names()
    if missing:
        _refuse_later(kinds, missing)
        return
    for kind in kinds:
        if getattr(torch.optim, kind.__name__, None) is not kind:
            setattr(torch.optim, kind.__name__, kind)
            ZERO_SUPPORTED_OPTIMIZERS.append(kind)
    _wrap_engine()


@functools.cache
def _wrap_engine() -> None:
    engine_class = internals.DeepSpeedEngine
    build, check = engine_class._configure_basic_optimizer, engine_class._do_optimizer_sanity_check
    configure = engine_class._configure_optimizer

    @functools.wraps(build)
    def built(engine: Any, model_parameters: Any) -> Any:
        kind = getattr(torch.optim, engine.optimizer_name(), None)
        if not (isinstance(kind, type) and issubclass(kind, AlphaOptimizer)):
            return build(engine, model_parameters)
        return json_config.build(kind, engine, model_parameters)

    @functools.wraps(check)
    def checked(engine: Any, basic_optimizer: Any) -> Any:
        if isinstance(basic_optimizer, AlphaOptimizer):
            refusals.refuse(engine, basic_optimizer)
        else:
            refusals.refuse_swapped(basic_optimizer)
        return check(engine, basic_optimizer)

    @functools.wraps(configure)
    def configured(engine: Any, *args: Any, **kwargs: Any) -> None:
        configure(engine, *args, **kwargs)
        if isinstance(engine.basic_optimizer, AlphaOptimizer):
            attach(engine, engine.basic_optimizer)

    engine_class._configure_basic_optimizer = built
    engine_class._do_optimizer_sanity_check = checked
    engine_class._configure_optimizer = configured


def _refuse_later(kinds: Sequence[type[AlphaOptimizer]], missing: list[str]) -> None:
    """DeepSpeed has changed: leave the rest of the package usable, and fail where an optimizer meets an engine."""

    def refuse_type(*args: Any, **kwargs: Any) -> None:
        raise internals.moved(missing)

    for kind in kinds:
        setattr(torch.optim, kind.__name__, refuse_type)
    engine_class = internals.DeepSpeedEngine
    init = engine_class.__init__

    @functools.wraps(init)
    def checked_init(engine: Any, *args: Any, **kwargs: Any) -> None:
        init(engine, *args, **kwargs)
        if isinstance(getattr(engine, "basic_optimizer", None), AlphaOptimizer) or isinstance(
            getattr(engine, "optimizer", None), AlphaOptimizer
        ):
            raise internals.moved(missing)

    engine_class.__init__ = checked_init


def attach(engine: Any, optimizer: AlphaOptimizer) -> None:
    """Make the engine's steps count the whole model. Collective over its data-parallel group.

    Raises:
        RuntimeError: DeepSpeed's objects lack a name of internals.py.
        ValueError: some element of the model would not count exactly once.
    """
    internals.check_instance(engine)
    internals.check_instance(engine.optimizer)
    wrapper = internals.wrapper_of(engine)
    flats = wrapper.flats()
    layout = build_layout(
        flats,
        wrapper.shards(internals.keys(engine)),
        wrapper.extents(),
        scope=optimizer.defaults["scope"],
        group=wrapper.group,
        device=statistics_device(flats, wrapper.group),
        merge=True,
        names=internals.keys_of_all_ranks(engine),
    )
    agreement.settle(layout, optimizer.defaults, engine.seq_data_parallel_group)
    replicas.prove(layout, optimizer)
    optimizer.use_layout(layout, driven=wrapper.in_parts)
    if wrapper.in_parts:
        _drive(optimizer, layout, wrapper)
    if wrapper.zero is not optimizer:
        _watch_loading(optimizer, wrapper.zero)
    monitor.attach(engine, optimizer)


def _watch_loading(optimizer: AlphaOptimizer, zero: Any) -> None:
    """Check a checkpoint before DeepSpeed loads it, and after a universal one make the groups whole.

    DeepSpeed trips over a checkpoint of other parameter groups before the optimizer can name the reason. A universal
    checkpoint it loads past the optimizer, and at stage 3 gives every group the values of the first: weight decay would
    hit the parameters that are spared from it.
    """
    load = zero.load_state_dict

    @functools.wraps(load)
    def watched(*args: Any, **kwargs: Any) -> Any:
        folder = kwargs.get("checkpoint_folder")
        saved = universal.saved_optimizer(folder) if folder else None
        held = args[0] if args else kwargs["state_dict_list"]
        for state_dict in internals.optimizer_states(held) if saved is None else [saved]:
            optimizer.check_saved(state_dict)
        result = load(*args, **kwargs)
        if saved is not None:
            for group, as_saved in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                group.update((name, value) for name, value in as_saved.items() if name != "params")
            optimizer.__setstate__({})
        return result

    zero.load_state_dict = watched


def _drive(optimizer: AlphaOptimizer, layout: Layout, wrapper: internals.Wrapper) -> None:
    """Open, count and close each step around a wrapper that calls ``optimizer.step()`` for one part after another."""
    zero = wrapper.zero
    exact = optimizer.defaults["sync"] == "exact"
    true_scale = optimizer.defaults["threshold"] > 0
    step, unscale = zero.step, zero.unscale_and_clip_grads
    counted = False

    @functools.wraps(step)
    def whole_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted = False
        optimizer.open_step(layout)
        result = step(*args, **kwargs)
        if not zero.overflow:
            optimizer.close_step()
        return result

    @functools.wraps(unscale)
    def count_then_unscale(which: Any, total_norm: Tensor | None) -> Any:
        nonlocal counted
        if exact and not counted:
            counted = True
            scale = internals.unscale_factor(zero, total_norm) if true_scale else None
            optimizer.count(wrapper.gradients(), scale)
        return unscale(which, total_norm)

    zero.step, zero.unscale_and_clip_grads = whole_step, count_then_unscale
