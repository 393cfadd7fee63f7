"""Which cases of a test run when: a few in every run of `make test-fast`, the rest later."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases for ``parametrize``, all marked slow but the ``fast`` ones."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def nightly_but(cases: Iterable[Any], *, every: int) -> list[Any]:
    """Cases for ``parametrize``, all marked nightly but every so many'th: neighbours stand in for each other."""
    split = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.nightly if i % every else ()) for i, case in enumerate(split)]


def leave_to_nightly(items: Iterable[pytest.Item]) -> None:
    """Mark the cases of slow tests nightly but those that show a value of one of the test's parameters first."""
    shown: dict[str, set[tuple[str, object]]] = defaultdict(set)
    for item in sorted(items, key=lambda item: item.get_closest_marker("slow") is not None):
        if not hasattr(item, "callspec") or item.get_closest_marker("nightly") is not None:
            continue
        values = {
            (name, value if isinstance(value, Hashable) else repr(value))
            for name, value in item.callspec.params.items()
        }
        known = shown[item.nodeid.partition("[")[0]]
        if item.get_closest_marker("slow") is not None and values <= known:
            item.add_marker(pytest.mark.nightly)
        known |= values
