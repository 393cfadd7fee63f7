"""Fixtures: pools of ranks, made once a session."""

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

# as in an activated environment: launchers are found there, and the ninja with which DeepSpeed compiles
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whomever

from . import older
from .marks import leave_to_nightly
from .ranks import Ranks

older.load_what_deepspeed_saved()


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks, and pytest-xdist the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for the night, and what pytest-xdist must not tear apart: all tests over pools of ranks, which are
    started once; else each file."""
    leave_to_nightly(items)
    for item in items:
        pooled = any(name in ("ranks1", "ranks2", "ranks3", "ranks4") for name in getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("ranks" if pooled else item.path.stem))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that pytest-xdist does not see would start every pool twice, and share it with tests of any order."""
    if getattr(session.config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in session.items), "pytest-xdist did not take the groups over"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skip what older versions themselves cannot do; they say so deep in a rank, so no condition could tell before."""
    try:
        return (yield)
    except Exception as error:
        reason = older.lacks(error)
        if reason is None:
            raise
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def few_process_groups() -> Iterator[None]:
    yield
    for pool in list(Ranks.alive):
        pool.restart_if_crowded()


def _pool(world: int) -> Iterator[Ranks]:
    ranks = Ranks(world)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def ranks1() -> Iterator[Ranks]:
    yield from _pool(1)


@pytest.fixture(scope="session")
def ranks2() -> Iterator[Ranks]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def ranks3() -> Iterator[Ranks]:
    yield from _pool(3)


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Ranks]:
    yield from _pool(4)
