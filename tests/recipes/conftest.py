"""Shared by the tests of the recipes."""

from pathlib import Path

import pytest

from alphaadam_dist.paths import cache_dir


def only_kernels(folder: Path) -> Path:
    """A new cache folder with nothing in it but the compiled kernels, which take half a minute."""
    folder.mkdir()
    kernels = cache_dir() / "kernels"
    kernels.mkdir(exist_ok=True)
    (folder / "kernels").symlink_to(kernels)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, so that a test neither reads nor fills the user's."""
    folder = only_kernels(tmp_path / "cache")
    monkeypatch.setenv("ALPHAADAM_CACHE", str(folder))
    return folder
