"""Fixtures: pools of ranks, made once a session."""

from collections.abc import Iterator

import pytest

from .ranks import Ranks


def _pool(world: int) -> Iterator[Ranks]:
    ranks = Ranks(world)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def ranks2() -> Iterator[Ranks]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def ranks3() -> Iterator[Ranks]:
    yield from _pool(3)


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Ranks]:
    yield from _pool(4)
