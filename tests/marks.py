"""Which cases of a test run when: a few in every run of `make test-fast`, the rest later."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases for ``parametrize``, all marked slow but the ``fast`` ones."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def nightly_but(cases: Iterable[Any], *, every: int) -> list[Any]:
    """Cases for ``parametrize``, all marked nightly but every so many'th: neighbours stand in for each other."""
    split = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.nightly if i % every else ()) for i, case in enumerate(split)]
