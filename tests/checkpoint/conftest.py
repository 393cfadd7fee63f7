"""Fixtures: runs to go on from, made once."""

import pytest

from tests.ranks import Ranks

from .test_universal import Saved


@pytest.fixture(scope="session")
def saved(ranks2: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(ranks2, tmp_path_factory.mktemp("saved"))
