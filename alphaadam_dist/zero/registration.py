"""Makes deepspeed.initialize take our optimizers, from its JSON or as client objects, without importing DeepSpeed.

``register`` runs when an optimizer of the package is first asked for, or else when DeepSpeed's engine is imported. It
names each optimizer under torch.optim, where DeepSpeed looks up the type in a JSON config, and as soon as DeepSpeed's
engine is imported, by whomever, it wraps four methods of it: one reads the name in the JSON in any case, one builds the
optimizer of that name, one refuses what is not served before DeepSpeed wraps anything around the optimizer, and one
attaches to that wrapper once it stands. Whatever DeepSpeed is or lacks, neither import fails by this; what it lacks is
an error where an optimizer meets an engine.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..import_hook import DEEPSPEED_ENGINE as ENGINE
from ..import_hook import when_imported
from ..optimizer import AlphaOptimizer
from . import versions

METHODS = ("optimizer_name", "_configure_basic_optimizer", "_do_optimizer_sanity_check", "_configure_optimizer")

LAUNCHER = "deepspeed.launcher.runner"
VARIABLES = "ALPHAADAM_"
"""What the names of our environment variables begin with."""

ATTACHES = "alphaadam_attaches"
"""Attribute of an engine that will attach to the optimizer that it is being configured with."""

_registered: list[type[AlphaOptimizer]] = []


def register(*kinds: type[AlphaOptimizer]) -> None:
    """Register optimizer classes with DeepSpeed, under their names. What is registered already stays as it is."""
    for kind in kinds:
        if getattr(torch.optim, kind.__name__, None) is not kind:
            setattr(torch.optim, kind.__name__, kind)
            _registered.append(kind)
    wrap_engine()
    when_imported(LAUNCHER, _export)
    if wrap_engine not in AlphaOptimizer._when_made:
        AlphaOptimizer._when_made.append(wrap_engine)


def wrap_engine() -> None:
    """Wrap DeepSpeed's engine, now or once it is imported.

    Every optimizer calls it when it is made: somebody else's import hook may have imported the engine past ours.
    """
    when_imported(ENGINE, _wrap)


def _wrap(engine: ModuleType) -> None:
    """Wrap the engine's methods, once. Raises nothing, whatever the module is like."""
    engine_class = getattr(engine, "DeepSpeedEngine", None)
    if not isinstance(engine_class, type):
        return
    wrapped: dict[str, Callable[..., Callable[..., Any]]] = dict(
        zip(METHODS, (_named, _built, _checked, _configured), strict=True)
    )
    if not all(hasattr(engine_class, name) for name in METHODS):
        wrapped["__init__"] = _refused_after
    for name, wrap in wrapped.items():
        method = getattr(engine_class, name, None)
        if method is not None and not hasattr(method, "alphaadam"):
            ours = functools.wraps(method)(wrap(method))
            ours.alphaadam = True  # type: ignore[attr-defined]
            setattr(engine_class, name, ours)


def _export(launcher: ModuleType) -> None:
    """Let `deepspeed` hand our variables to the ranks on other nodes, as it does with Python's own.

    Raises RuntimeError where there is something to hand over and no way to.
    """
    prefixes = getattr(launcher, "EXPORT_ENVS", None)
    if isinstance(prefixes, list):
        prefixes += [VARIABLES] if VARIABLES not in prefixes else []
    elif given := [name for name in os.environ if name.startswith(VARIABLES)]:
        raise RuntimeError(
            f"this DeepSpeed's launcher has no EXPORT_ENVS, so it would not hand {', '.join(given)} to other nodes: "
            "unset it here, and set it in each node's own environment"
        )


def _named(name: Callable[..., Any]) -> Callable[..., Any]:
    """The name in the JSON, that of one of ours as the class writes it."""

    def named(engine: Any) -> Any:
        given = name(engine)
        return next((kind.__name__ for kind in _registered if kind.__name__.lower() == str(given).lower()), given)

    return named


def _built(build: Callable[..., Any]) -> Callable[..., Any]:
    def built(engine: Any, model_parameters: Any) -> Any:
        kind = getattr(torch.optim, engine.optimizer_name(), None)
        if not (isinstance(kind, type) and issubclass(kind, AlphaOptimizer)):
            return build(engine, model_parameters)
        _attach_module()  # for its errors
        from . import json_config

        return json_config.build(kind, engine, model_parameters)

    return built


def _checked(check: Callable[..., Any]) -> Callable[..., Any]:
    def checked(engine: Any, basic_optimizer: Any) -> Any:
        if isinstance(basic_optimizer, AlphaOptimizer):
            if not getattr(engine, ATTACHES, False):
                raise RuntimeError(
                    "deepspeed.initialize had begun before alphaadam_dist could wrap its engine, so that nobody would "
                    "count the whole model: write `import alphaadam_dist` before deepspeed.initialize, and leave out "
                    "import hooks that import DeepSpeed by themselves"
                )
            _attach_module().prepare(engine, basic_optimizer, supported=type(basic_optimizer) in _registered)
        else:
            refuse_swapped(basic_optimizer)
        return check(engine, basic_optimizer)

    return checked


def _configured(configure: Callable[..., None]) -> Callable[..., None]:
    def configured(engine: Any, *args: Any, **kwargs: Any) -> None:
        setattr(engine, ATTACHES, True)
        configure(engine, *args, **kwargs)
        if isinstance(engine.basic_optimizer, AlphaOptimizer):
            _attach_module().attach(engine, engine.basic_optimizer)

    return configured


def _refused_after(init: Callable[..., None]) -> Callable[..., None]:
    """For an engine that lacks a method that is wrapped: fail where one of ours has come through all the same."""

    def checked_init(engine: Any, *args: Any, **kwargs: Any) -> None:
        init(engine, *args, **kwargs)
        if any(isinstance(getattr(engine, name, None), AlphaOptimizer) for name in ("basic_optimizer", "optimizer")):
            raise versions.unserved(
                [f"{ENGINE}.DeepSpeedEngine.{name}" for name in METHODS if not hasattr(engine, name)]
            )

    return checked_init


def _attach_module() -> Any:
    """attach.py, which needs DeepSpeed's private names.

    Raises:
        RuntimeError: the installed DeepSpeed lacks one of them.
    """
    try:
        from . import attach, internals
    except Exception as error:
        raise versions.unserved([f"what internals.py imports ({error})"]) from error
    missing = internals.missing_names()
    if missing:
        raise versions.unserved(missing)
    return attach


def refuse_swapped(optimizer: Any) -> None:
    """Raise ValueError for an optimizer that somebody built from the parameter groups of one of ours in its place."""
    if any("alphaadam_state" in group for group in optimizer.param_groups):
        raise ValueError(
            f"the optimizer was replaced by {type(optimizer).__name__} on its way to DeepSpeed: Accelerate does that "
            'to an optimizer object under offload_optimizer. Set "zero_force_ds_cpu_optimizer": false in the DeepSpeed '
            'config, or name the optimizer there: "optimizer": {"type": "AlphaAdam", ...}'
        )
