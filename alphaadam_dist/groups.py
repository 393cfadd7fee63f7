"""Parameter groups by name: which parameters have a learning rate, a decay or betas of their own.

``[{"match": "embed_tokens|lm_head", "lr_scale": 4.0}, {"match": "norm|bias", "weight_decay": 0.0}]`` says it, in
Python, in a DeepSpeed JSON and in a file. The first entry whose pattern is in a parameter's name takes it; what no
entry takes keeps the optimizer's own values.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .alphaadam import AlphaAdam
from .files import read_json
from .optimizer import AlphaOptimizer
from .options import check_group
from .shards import clean_name, clean_names, fsdp1

EXAMPLE = '[{"match": "embed_tokens|lm_head", "lr_scale": 4.0}, {"match": "norm|bias", "weight_decay": 0.0}]'
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """Parameters of a model, by name, and what their group has of its own.

    Attributes:
        patterns: any of them in one of a parameter's names takes it; (what errors call it, the pattern).
        values: keys of the group.
    """

    patterns: tuple[tuple[str, re.Pattern[str]], ...]
    values: Mapping[str, Any]


def parameter_groups(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], optimizer: type[AlphaOptimizer] = AlphaAdam
) -> list[dict[str, Any]]:
    """Parameter groups of a model by the names of its parameters, for the constructor of an optimizer of this package.

    ``AlphaAdam(parameter_groups(model, [{"match": "embed", "lr_scale": 4.0}]), lr=1e-4)``. The learning rate of a
    group is lr * lr_scale wherever it is used, the decay included (arXiv 1711.05101 multiplies decay by it), and no
    scheduler writes lr_scale. Call it after sharding, as the constructor.

    Args:
        model: its parameters, the frozen ones too, each once. A tied parameter has several names, and any counts.
            Names are those of the bare model: without what DDP, FSDP, torch.compile and activation checkpointing put
            into them.
        groups: entries in the order of their precedence. ``match`` is a regular expression that re.search looks for
            in the name. Beside it ``lr_scale``, more than 0, and the hyperparameters of a group of the optimizer.
        optimizer: the class that the groups are for.

    Returns:
        The group of what no entry took, then one for each entry; none is empty. "params" are (name, parameter) pairs.

    Raises:
        ValueError: an entry of another form, a value out of range, a broken pattern, one that is in no name, or one
            whose parameters earlier entries took.
    """
    names = named_parameters(model)
    pairs = [(of_one[0], param) for param, of_one in names.items()]
    return split([{"params": pairs}], read(groups, optimizer, "groups"), names)


def read_file(path: Path, optimizer: type[AlphaOptimizer] = AlphaAdam) -> list[dict[str, Any]]:
    """Entries from a JSON file, checked. Raises ValueError where it holds others than ``parameter_groups`` takes."""
    entries = read_json(path, f"write a list there, as in {EXAMPLE}")
    read(entries, optimizer, f"{path}: groups")
    return list(entries)


def read(groups: Any, optimizer: type[AlphaOptimizer], where: str) -> list[Entry]:
    """The entries that somebody wrote for an optimizer class; errors begin with ``where``. Raises ValueError."""
    if not isinstance(groups, Sequence) or isinstance(groups, (str, bytes)) or not groups:
        raise ValueError(f"{where}={groups!r}: give a list of entries, as in {EXAMPLE}")
    return [_entry(given, optimizer, f"{where}[{i}]") for i, given in enumerate(groups)]


def _entry(given: Any, optimizer: type[AlphaOptimizer], where: str) -> Entry:
    kind = optimizer.__name__
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ValueError(f'{where}={given!r}: write an entry, as in {{"match": "norm|bias", "weight_decay": 0.0}}')
    known = optimizer.group_keys()
    for key, value in given.items():
        if key != "match" and key not in known:
            near = difflib.get_close_matches(key, ("match", *known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it."
            raise ValueError(
                f"{where} has {key}={value!r}, which a group of {kind} does not have: {hint} "
                f"Keys: match, {', '.join(sorted(known))}"
            )
    match = given.get("match")
    if not isinstance(match, str) or not match:
        raise ValueError(f'{where} has match={match!r}: give a regular expression, as in "norm|bias"')
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise ValueError(
            f"{where} has match={match!r}, which is no regular expression ({error}): correct it; re.escape makes one "
            "of any name"
        ) from None
    values = {key: value for key, value in given.items() if key != "match"}
    if not values:
        raise ValueError(
            f"{where} has match={match!r} and nothing that its parameters should have: add one of "
            f"{', '.join(sorted(known))}, or remove it"
        )
    defaults = {name: inspect.signature(optimizer).parameters[name].default for name in optimizer.hyperparameters}
    checked = {**defaults, "lr_scale": 1.0, **values}
    try:
        check_group(kind, checked, optimizer.hyperparameters)
        optimizer.check_hyperparameters(checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Entry(((f"{where} has match={match!r}", pattern),), {key: checked[key] for key in values})


def no_decay(words: Any, where: str) -> Entry:
    """The short form: parameters with one of these words in the name, in any case, do not decay. Raises ValueError."""
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f'{where}={words!r}: give a list of words, as in ["bias", "norm"]')
    patterns = tuple((f"{where} has {word!r}", re.compile(re.escape(word), re.IGNORECASE)) for word in words)
    return Entry(patterns, {"weight_decay": 0.0})


def split(
    given: Iterable[Mapping[str, Any]], entries: Sequence[Entry], names: Mapping[Tensor, Sequence[str]]
) -> list[dict[str, Any]]:
    """Each of these parameter groups, cut by entries: what none takes first, then theirs; none is empty.

    ``names`` are those of the whole model, as ``named_parameters`` has them. Raises ValueError where an entry would
    change nothing because of how it is written.
    """
    taken = _taken(entries, names)
    result = []
    for group in given:
        parts: list[list[Any]] = [[] for _ in range(1 + len(entries))]
        for item in group["params"]:
            parts[taken.get(item[1] if isinstance(item, tuple) else item, 0)].append(item)
        for values, part in zip(({}, *(entry.values for entry in entries)), parts, strict=True):
            if part:
                result.append({**group, **values, "params": part})
    return result


def named_parameters(model: nn.Module) -> dict[Tensor, list[str]]:
    """The parameters of a model, each with its names in the bare model. Raises ValueError where FSDP1 merged some."""
    named = []
    for name, param in model.named_parameters(remove_duplicate=False):
        first, *others = fsdp1.keys(param, name)
        if others:
            raise ValueError(
                f"FSDP1 has made one parameter of {', '.join(map(clean_name, (first, *others[:_NAMES_SHOWN])))}, so "
                "they can be in one group only: give FSDP1 use_orig_params=True, or shard with FSDP2"
            )
        named.append((first, param))
    clean = clean_names(name for name, _ in named)
    result: dict[Tensor, list[str]] = {}
    for name, param in named:
        result.setdefault(param, []).append(clean[name])
    return result


def _taken(entries: Sequence[Entry], names: Mapping[Tensor, Sequence[str]]) -> dict[Tensor, int]:
    """Which entry takes a parameter, counted from 1; those that none takes are left out."""
    everyone = [name for of_one in names.values() for name in of_one]
    taken: dict[Tensor, int] = {}
    for number, entry in enumerate(entries, start=1):
        for said, pattern in entry.patterns:
            if not any(pattern.search(name) for name in everyone):
                raise ValueError(
                    f"{said}, which is in no parameter's name: correct or remove it. {_near(pattern.pattern, everyone)}"
                )
        found = [p for p, of_one in names.items() if any(x.search(n) for _, x in entry.patterns for n in of_one)]
        rest = [param for param in found if param not in taken]
        if not rest:
            earlier = " and ".join(dict.fromkeys(entries[taken[param] - 1].patterns[0][0] for param in found))
            raise ValueError(
                f"{entry.patterns[0][0]}, but all that it matches is taken before it ({earlier}), and the first match "
                "wins: put it before them, or remove it"
            )
        taken.update(dict.fromkeys(rest, number))
    return taken


def _near(pattern: str, names: Sequence[str]) -> str:
    """The names of which a part is like a word of the pattern; where there are none, some names."""
    parts = {part for name in names for part in name.split(".")}
    words = [word.lower() for word in re.findall(r"\w+", pattern)]
    near = {part for word in words for part in difflib.get_close_matches(word, sorted(parts))}
    found = [name for name in names if near & set(name.split("."))]
    return f"Names are like {', '.join((found or sorted(names))[:_NAMES_SHOWN])}"
