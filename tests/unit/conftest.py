"""Set-up of the unit tests: one thread, for their tensors are small, and processes that start while others compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pools(item: pytest.Item) -> list[str]:
    return [name for name in getattr(item, "fixturenames", ()) if name in ("ranks2", "ranks4")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Within this folder the tests over ranks come last: importing torch in every rank takes seconds."""
    places = [i for i, item in enumerate(items) if HERE in item.path.parents]
    ours = sorted((items[i] for i in places), key=lambda item: bool(pools(item)))
    for i, item in zip(places, ours, strict=True):
        items[i] = item


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def ranks_start_early(request: pytest.FixtureRequest) -> None:
    for name in {name for item in request.session.items if HERE in item.path.parents for name in pools(item)}:
        request.getfixturevalue(name)
