"""Fixtures: one thread, on which small tensors compute fastest, and what each rank warns of."""

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """This library's warnings on each rank, on threads too, where catch_warnings would mix them."""
    heard: dict[int, list[str]] = defaultdict(list)

    def warn(message: Any, *args: Any, **kwargs: Any) -> None:
        if sys._getframe(1).f_globals["__name__"].startswith("alphaadam_dist"):
            heard[dist.get_rank()].append(str(message))

    monkeypatch.setattr(warnings, "warn", warn)
    return heard
