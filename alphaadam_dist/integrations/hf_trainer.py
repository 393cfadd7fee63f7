"""Makes HF's Trainer take our optimizers by name and log what they do, without importing Transformers.

``register`` runs when an optimizer of the package is first asked for, or else when Transformers is imported. As soon as
Transformers' training arguments are imported, ``optim`` takes the names in lower case ("alphaadam"); as soon as the
Trainer is, it builds the optimizer of that name with the arguments' lr, betas and eps and the options in
``optim_args``, where ``groups=FILE`` stands for the parameter groups in a JSON file. ALPHAADAM_OPTIM in the environment
goes before ``optim``, for tools that do not pass it. A callback checks, before the first step, that this is the
optimizer that trains.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import groups
from ..import_hook import HF_ARGUMENTS, HF_TRAINER, when_imported
from ..optimizer import AlphaOptimizer
from ..options import NAMES

VARIABLE = "ALPHAADAM_OPTIM"
"""The environment variable that names the optimizer of every Trainer."""

_WORDS = {"true": True, "false": False, "none": None}

_kinds: dict[str, type[AlphaOptimizer]] = {}


def register(*kinds: type[AlphaOptimizer]) -> None:
    """Register optimizer classes with HF's Trainer, under their names in lower case."""
    _kinds.update({kind.__name__.lower(): kind for kind in kinds})
    when_imported(HF_ARGUMENTS, _add_names)
    when_imported(HF_TRAINER, _wrap)


def names() -> tuple[str, ...]:
    """What ``optim`` and ALPHAADAM_OPTIM may be."""
    return tuple(_kinds)


def asked_for(args: Any) -> type[AlphaOptimizer] | None:
    """The optimizer class that the environment or else the TrainingArguments name; None where it is not one of ours.

    Raises:
        ValueError: the environment names none of ours.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return _kinds.get(_named(args))
    if name.lower() not in _kinds:
        raise ValueError(f"{VARIABLE}={name!r} is unknown: give {', '.join(names())}, or unset it")
    return _kinds[name.lower()]


def _named(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def options_of(kind: type[AlphaOptimizer], args: Any) -> dict[str, Any]:
    """What TrainingArguments say to the constructor of an optimizer class; ``optim_args`` goes before its other fields.

    Weight decay is left out: the Trainer writes it into the groups.

    Raises:
        ValueError: ``optim_args`` is not of the form "gamma=0.1,sync=delayed".
    """
    fields = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {**{name: value for name, value in fields.items() if name in kind.hyperparameters}, **_told(args)}


def _told(args: Any) -> dict[str, Any]:
    """What ``optim_args`` say."""
    told = {}
    for part in filter(None, map(str.strip, (args.optim_args or "").split(","))):
        name, equals, text = map(str.strip, part.partition("="))
        if not (name and equals and text):
            raise ValueError(f'optim_args has {part!r}: write name=value, as in "gamma=0.1,sync=delayed"')
        told[name] = _value(text)
    return told


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _refuse_passed_over(args: Any, found: AlphaOptimizer) -> None:
    """Raise ValueError where whoever built the optimizer that trains never saw ``optim_args``."""
    for name, value in _told(args).items():
        held = getattr(found._run.options, name) if name in NAMES else found.defaults.get(name)
        if name == "groups":
            passed_over, trains = len(found.param_groups) == 1, "one parameter group"
        else:
            known = name in (*NAMES, *found.hyperparameters)  # torch's other options change nothing
            passed_over, trains = known and held != value, f"{name}={held!r}"
        if passed_over:
            raise ValueError(
                f"optim_args has {name}={value!r}, but this {type(found).__name__} trains with {trains}: the DeepSpeed "
                "config, the script or the tool brings it, and does not read optim_args. Write it there"
            )


def find_alpha_optimizer(optimizer: Any) -> AlphaOptimizer | None:
    """The one of ours inside the wrappers of DeepSpeed, Accelerate and the Trainer; None where there is none."""
    while optimizer is not None and not isinstance(optimizer, AlphaOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def log_metrics(state: Any, logs: dict[str, Any], optimizer: Any) -> None:
    """Add ``metrics()`` of one of ours to an entry of the log that carries a training loss, and to the history.

    Reading them waits for the device, so it is done only when a log is written, and once. What is None is left out,
    and what the Trainer has written stays: its ``grad_norm`` is of the gradients before the Trainer clipped them.
    """
    found = find_alpha_optimizer(optimizer) if "loss" in logs and "alpha" not in logs else None
    if found is not None:
        ours = {name: value for name, value in found.metrics().items() if value is not None}
        logs.update({**ours, **logs})
        state.log_history[-1].update(logs)


def _add_names(arguments: ModuleType) -> None:
    """Make the names members of the enumeration that ``optim`` is checked against, here and by argparse."""
    names = getattr(arguments, "OptimizerNames", None)
    if names is None:  # in the middle of its import, or a version without: `optim` is refused by its own check
        return
    for name in _kinds:
        if name not in names._value2member_map_:
            member = str.__new__(names, name)
            member._name_, member._value_ = name.upper(), name
            names._member_names_.append(member._name_)
            names._member_map_[member._name_] = names._value2member_map_[name] = member


def _wrap(trainer: ModuleType) -> None:
    """Wrap the Trainer's choice of a class, and its constructor, which adds the callback to those it has; once.

    The Trainer's list of default callbacks is no place for ours: tools replace it.

    Raises RuntimeError where the environment names an optimizer and this Trainer has no place for it.
    """
    missing = [name for name in ("Trainer", "TrainerCallback") if not hasattr(trainer, name)]
    if not missing and not hasattr(trainer.Trainer, "get_optimizer_cls_and_kwargs"):
        missing = ["Trainer.get_optimizer_cls_and_kwargs"]
    if missing:
        if getattr(trainer.__spec__, "_initializing", False):  # it is being imported, and this is called again after it
            return
        if os.environ.get(VARIABLE):
            raise RuntimeError(
                f"{VARIABLE}={os.environ[VARIABLE]!r} cannot be served: this version of Transformers has no "
                f"{', '.join(missing)} in {HF_TRAINER}. Install a tested version, or unset the variable"
            )
        return
    choose = trainer.Trainer.get_optimizer_cls_and_kwargs
    if not hasattr(choose, "alphaadam"):
        ours = functools.wraps(choose)(_chosen(choose))
        ours.alphaadam = True  # type: ignore[attr-defined]
        trainer.Trainer.get_optimizer_cls_and_kwargs = staticmethod(ours)
        trainer.Trainer.__init__ = _made(trainer.Trainer.__init__, _callback(trainer.TrainerCallback))


def _chosen(choose: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(args: Any, *others: Any, **named: Any) -> Any:
        kind = asked_for(args)
        if kind is None:
            return choose(args, *others, **named)
        options = options_of(kind, args)
        if "weight_decay" in options and "groups" not in options:
            raise ValueError(
                f"optim_args has weight_decay={options['weight_decay']!r}, over which the Trainer writes its own, "
                f"{args.weight_decay!r}, in every parameter group: give it as weight_decay= (--weight_decay)"
            )
        if "groups" in options:
            file, model = Path(str(options.pop("groups"))), others[0] if others else named.get("model")
            if model is None:
                raise ValueError(
                    f"optim_args has groups={file}, but a create_optimizer that is not the Trainer's asks for the "
                    "optimizer without its model, and makes parameter groups of its own: leave groups out, or override "
                    "create_optimizer with one that makes them by alphaadam_dist.parameter_groups(model, [...])"
                )
            # the Trainer takes these in place of its own two groups, which had the decay
            options["params"] = groups.parameter_groups(model, groups.read_file(file, kind), kind)
            options.setdefault("weight_decay", args.weight_decay)
        return kind, options

    return chosen


def _made(init: Callable[..., None], callback: type) -> Callable[..., None]:
    @functools.wraps(init)
    def made(trainer: Any, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        trainer.callback_handler.callbacks.insert(0, callback())  # before those that write logs out

    return made


def _callback(base: type) -> type:
    """A TrainerCallback, whose class is known only once Transformers is imported."""

    class AlphaAdamCallback(base):
        """Checks that the optimizer that was asked for trains, and logs what one of ours did."""

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
            """Raise ValueError where something else trains than what was asked for, or with other options."""
            kind, found = asked_for(args), find_alpha_optimizer(optimizer)
            if kind is not None and found is not None and isinstance(found, kind):
                _refuse_passed_over(args, found)
            elif kind is not None:
                while hasattr(optimizer, "optimizer"):
                    optimizer = optimizer.optimizer
                asked = f"{VARIABLE}={os.environ[VARIABLE]}" if os.environ.get(VARIABLE) else f"optim={_named(args)}"
                raise ValueError(
                    f"{asked} asks for {kind.__name__}, but {type(optimizer).__name__} would train: the DeepSpeed "
                    f'config, the script or the tool brings it. Write "optimizer": {{"type": "{kind.__name__}", ...}} '
                    "into the DeepSpeed config, leave the optimizer out there, or ask for none here"
                )

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
            """Raise ValueError where the Trainer would clip gradients that have been stepped and freed by then."""
            found = find_alpha_optimizer(optimizer)
            if found is not None and found._run.in_backward is not None and args.max_grad_norm:
                raise ValueError(
                    f"max_grad_norm={args.max_grad_norm} with step_in_backward: the gradients are stepped and freed "
                    "before the Trainer could clip them. Give max_grad_norm=0, or leave step_in_backward out"
                )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **others: Any
                   ) -> None:  # fmt: skip
            """Add alpha and agreement."""
            log_metrics(state, logs, optimizer)

    return AlphaAdamCallback
