"""Shared by the tests of the recipes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Small enough to train in a blink, on text of its own."""
    from benchmarks.convergence import text

    from .studies import TINY

    data = tmp_path_factory.mktemp("data")
    for i in range(60):
        body = f'"""What file {i} is about. """\n' + f"def f{i}(x):\n    '''Add {i} to x, and say so. '''\n" * 30
        (data / f"{i}.py").write_text(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPHAADAM_CACHE", str(only_kernels(tmp_path_factory.mktemp("study") / "cache")))
        patch.setattr(text, "PACKAGES", ("json", "tomllib"))
        yield replace(TINY, data=str(data))
        for cached in (text.language, text.documentation, text.packages, text.corpus, text.bpe):
            cached.cache_clear()


class InThisProcess(ThreadPoolExecutor):
    def __init__(self, workers: int, **_: Any) -> None:
        super().__init__(workers)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the comparison go on in this process."""
    from benchmarks.convergence import runner

    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
