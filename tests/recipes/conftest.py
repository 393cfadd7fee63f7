"""Shared by the tests of the recipes."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that a test neither reads nor fills the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ALPHAADAM_CACHE", str(folder))
    return folder
