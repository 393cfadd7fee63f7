"""Makes an engine's steps count the whole model, once DeepSpeed has wrapped the optimizer."""

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import replicas
from ..kernels import consensus
from ..layout import Layout, build_layout, statistics_device
from ..optimizer import AlphaOptimizer
from ..persistence import Driver
from ..saved_state import check_order
from ..shards import Shard
from ..step import Step
from . import internals, monitor, parallel, refusals, universal, versions
from .rank_files import RankFiles, optimizer_states
from .registration import register
from .unused import Unused, check_missed, watch_zero_filled

__all__ = ["attach", "prepare", "register"]


def prepare(engine: Any, optimizer: AlphaOptimizer, *, supported: bool) -> None:
    """Before DeepSpeed wraps an optimizer. Raises ValueError where the result would not be exact.

    ``supported``: DeepSpeed need not be told to allow it.
    """
    if supported:
        internals.allow(type(optimizer))
    if optimizer._run.options.state_dtype is not None:
        internals.allow_bf16_offload(AlphaOptimizer)
    refusals.refuse(engine, optimizer)
    versions.warn_untested()


def attach(engine: Any, optimizer: AlphaOptimizer) -> None:
    """Make the engine's steps count the whole model. Collective over the ranks that hold it.

    Raises:
        RuntimeError: DeepSpeed's objects lack a name of internals.py.
        ValueError: some element of the model would not count exactly once.
    """
    internals.check_instance(engine)
    internals.check_instance(engine.optimizer)
    wrapper = internals.wrapper_of(engine)
    layout, shards, names = _use_layout(engine, optimizer, wrapper)
    if isinstance(wrapper, internals.InParts):
        _drive_parts(optimizer, wrapper, Unused(optimizer, wrapper, layout, shards, names))
    elif isinstance(wrapper, internals.AtOnce):
        watch_zero_filled(engine, optimizer, wrapper, names)
    if wrapper.zero is not optimizer:
        _watch_loading(optimizer, wrapper, shards, names)
    _watch_groups(engine, optimizer, wrapper)
    monitor.attach(engine, optimizer)


def _use_layout(
    engine: Any, optimizer: AlphaOptimizer, wrapper: internals.Wrapper
) -> tuple[Layout, list[list[Shard]], dict[Tensor, str]]:
    """Give the optimizer its layout: that, what each flat holds, and the parameters' names. Collective as attach is."""
    flats, names = wrapper.flats(), parallel.keys(engine)
    shards = parallel.in_the_model(engine, wrapper.shards(names))
    group = parallel.group(engine) or wrapper.group
    layout = build_layout(
        flats,
        shards,
        wrapper.numels(),
        scope=optimizer._run.options.scope,
        group=group,
        device=statistics_device(flats, group),
        merge=optimizer._run.options.state_dtype is None,
        names=parallel.keys_of_all_ranks(engine),
    )
    consensus.settle(layout, optimizer._run.options, engine.seq_data_parallel_group)
    replicas.prove(layout, optimizer)
    optimizer._run.layout, optimizer._run.driver = layout, Driver(layout, internals.grad_norm_of(engine))
    return layout, shards, names


def _watch_groups(engine: Any, optimizer: AlphaOptimizer, wrapper: internals.Wrapper) -> None:
    """Serve a parameter group that is added from now on at stage 0, refuse it where DeepSpeed would not see it."""
    add = optimizer.add_param_group

    @functools.wraps(add)
    def added(param_group: dict[str, Any]) -> None:
        if not isinstance(wrapper, internals.Replicated):
            raise ValueError(
                f"add_param_group after deepspeed.initialize, at stage {engine.zero_optimization_stage()}: DeepSpeed "
                "has made its partitions and would not step the new parameters. Give all groups to the optimizer "
                "before initialize (those that are to train later with lr=0), or use stage 0"
            )
        add(param_group)
        try:
            refusals.refuse_outside(engine, optimizer, optimizer.param_groups[-1:])
        except ValueError:
            optimizer.param_groups.pop()
            raise
        wrapper.take_group(optimizer.param_groups[-1])
        _use_layout(engine, optimizer, wrapper)

    optimizer.add_param_group = added  # type: ignore[method-assign]


def _watch_loading(
    optimizer: AlphaOptimizer, wrapper: internals.Wrapper, shards: list[list[Shard]], names: dict[Tensor, str]
) -> None:
    """Check a checkpoint before DeepSpeed loads it, and after a universal one make the groups whole.

    DeepSpeed trips over a checkpoint of other parameter groups before the optimizer can name the reason. A universal
    checkpoint it loads past the optimizer, and at stage 3 gives every group the values of the first: weight decay would
    hit the parameters that are spared from it.
    """
    load = wrapper.zero.load_state_dict
    group = None if isinstance(wrapper, internals.Replicated) else wrapper.group  # at stage 0 all ranks load one file
    files = RankFiles(optimizer, group, shards, names.values()) if group is not None else None

    @functools.wraps(load)
    def watched(*args: Any, **kwargs: Any) -> Any:
        folder = kwargs.get("checkpoint_folder")
        saved = [universal.saved_optimizer(folder)] if folder else []
        if not folder:
            saved += optimizer_states(args[0] if args else kwargs["state_dict_list"])
        if files is None or folder:
            for state_dict in saved:
                optimizer._check_saved(state_dict)
                check_order(optimizer.param_groups, state_dict["param_groups"])
                check_missed(state_dict)
        else:
            files.check(saved, alone=kwargs.get("load_serial") is not None)
        result = load(*args, **kwargs)
        if folder:
            for held, as_saved in zip(optimizer.param_groups, saved[0]["param_groups"], strict=True):
                held.pop("lr_scale", None)  # an older checkpoint has none, and DeepSpeed leaves what is here
                held.update((name, value) for name, value in as_saved.items() if name != "params")
            optimizer.__setstate__({})
        if files is not None:
            files.mark()
        return result

    wrapper.zero.load_state_dict = watched


def _drive_parts(optimizer: AlphaOptimizer, wrapper: internals.InParts, unused: Unused) -> None:
    """Open, count and close each step around a wrapper that calls ``optimizer.step()`` for one part after another."""
    zero, options = wrapper.zero, optimizer._run.options
    if options.reads_first:
        wrapper.count_first()
    step, unscale = zero.step, zero.unscale_and_clip_grads
    opened: Step | None = None
    factor: Tensor | None = None  # of the part that is stepped next, where its gradients are not unscaled yet

    @functools.wraps(step)
    def whole_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal opened
        opened = Step(optimizer, unused.open())
        try:
            result = step(*args, **kwargs)
            if not zero.overflow:
                opened.close()
                unused.applied()
        finally:
            opened = None
        return result

    @functools.wraps(unscale)
    def count_then_leave_scaled(which: Any, total_norm: Tensor | None) -> Any:
        """Leave to the update the product that DeepSpeed would write, which saves a pass over the gradients."""
        nonlocal factor
        if opened is None:
            return unscale(which, total_norm)
        scale = internals.unscale_factor(zero, total_norm)
        if opened.may("count"):
            opened.count(wrapper.gradients(), scale if options.threshold > 0 else None)
        # a product that is not fp32 is rounded to 16 bits by DeepSpeed, and so it stays
        factor = scale if internals.unscales_in_fp32(zero, which) else None
        return unscale(which, total_norm) if factor is None else None

    def update_part() -> None:
        if opened is None or not opened.may("update"):
            raise RuntimeError(
                "step() was called on a part of the model before the whole of it was counted: DeepSpeed's wrapper did "
                "not run through the hooks of alphaadam_dist. Call engine.step(), never the optimizer's own step()"
            )
        opened.update(scale=factor)

    zero.step, zero.unscale_and_clip_grads = whole_step, count_then_leave_scaled
    assert optimizer._run.driver is not None
    optimizer._run.driver = replace(optimizer._run.driver, layout=unused.layout, update_part=update_part)
