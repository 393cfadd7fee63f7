"""Fixtures for tests of DeepSpeed."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="module")
def fresh_ranks_afterwards(ranks2: Ranks, ranks4: Ranks) -> Iterator[None]:
    """For modules after which DeepSpeed keeps parallelism or autocast in the process, to be met by the next engine."""
    yield
    ranks2.restart()
    ranks4.restart()
