"""Other versions of DeepSpeed and torch: what is said of them, and that the stated ranges are those that were run."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alphaadam_dist import torch_versions
from alphaadam_dist.torch_versions import numbers
from alphaadam_dist.zero import internals, older, versions
from tests import corners
from tests.older import deepspeed_has_bf16_masters

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
TABLE = (ROOT / "docs" / "versions.md").read_text()


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module of that name with a version to set."""
    module = SimpleNamespace(__version__="")
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    versions.warn_untested.cache_clear()
    torch_versions.warn_untested.cache_clear()
    return module


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0+cpu", (2, 13, 0)), ("0.19.8+abc.def", (0, 19, 8)), ("2.16.0a0+git12", (2, 16, 0)), ("3", (3,)), ("", ())],
)
def test_the_numbers_of_a_version(version: str, expected: tuple[int, ...]) -> None:
    assert numbers(version) == expected


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (
            "0.14.0",
            r"DeepSpeed 0\.14\.0, which is too old: it has not yet .*_x.*ZeRO stage 3.*Upgrade: ",
        ),
        ("0.17.0", r"DeepSpeed 0\.17\.0, which has moved: it no longer has .*ZeRO stage 3.*Install a tested version"),
        ("9.9", r"DeepSpeed 9\.9, which has moved: it no longer has .*ZeRO stage 3.*deepspeed>=0\.15\.4,<=0\.19\.8"),
        (None, r"DeepSpeed of an unknown version, which has moved"),
    ],
)
def test_a_missing_name_is_said_by_the_age_of_the_version(deepspeed: SimpleNamespace, version: str, said: str) -> None:
    deepspeed.__version__ = version
    error = versions.unserved(["deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._x"])
    assert re.search(said, str(error)), error


@pytest.mark.parametrize(
    ("version", "warned"), [("0.15.3", 1), ("0.15.4", 0), ("0.19.8", 0), ("0.19.8+cu1", 0), ("0.19.9", 1), ("1.0", 1)]
)
def test_an_untested_version_is_warned_of_once(deepspeed: SimpleNamespace, version: str, warned: int) -> None:
    deepspeed.__version__ = version
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        versions.warn_untested()
        versions.warn_untested()
    assert len(heard) == warned
    assert all(version in str(one.message) for one in heard)


@pytest.mark.parametrize(("version", "warned"), [("2.5.1", 1), ("2.6.0", 0), ("2.15.3+cpu", 0), ("2.16.0a0", 1)])
def test_so_is_torch(deepspeed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, version: str, warned: int) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch_versions.warn_untested()
        torch_versions.warn_untested()
    assert len(heard) == warned


@deepspeed_has_bf16_masters
def test_a_name_may_be_lacking_only_before_it_came(deepspeed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table lets a name go by the version, never because it is not there."""
    for name in older.SINCE:
        for names in internals.CLASS_NAMES.values():
            assert names.count(name) <= 1
    monkeypatch.delattr(internals.DeepSpeedEngine, "super_offload", raising=False)
    deepspeed.__version__ = "0.17.6"
    assert internals.missing_names() == []
    deepspeed.__version__ = "0.18.0"
    assert internals.missing_names() == ["deepspeed.runtime.engine.DeepSpeedEngine.super_offload"]


def test_every_younger_name_is_in_the_table_of_names() -> None:
    known = {name for names in (*internals.CLASS_NAMES.values(), *internals.INSTANCE_NAMES.values()) for name in names}
    assert older.SINCE.keys() <= known


# ---- the ranges


def lower_bound(package: str) -> str:
    found = re.search(rf'"{package}>=([0-9.]+)"', PROJECT)
    assert found is not None, package
    return found[1]


def test_no_dependency_has_an_upper_bound() -> None:
    """An optimizer must not replace anybody's torch."""
    listed = PROJECT[PROJECT.index("dependencies = [") : PROJECT.index("dev = [")]
    assert "<" not in listed
    assert "==" not in listed


@pytest.mark.parametrize("package", ["torch", "deepspeed", "transformers", "accelerate", "peft", "datasets"])
def test_the_lower_bounds_are_what_the_oldest_corner_runs(package: str) -> None:
    (pinned,) = [pin.partition("==")[2] for pin in corners.CORNERS["oldest"].packages if pin.startswith(f"{package}==")]
    bound = numbers(lower_bound(package))
    assert bound == numbers(pinned)[: len(bound)]


def test_the_constants_are_the_corners() -> None:
    for i, corner in enumerate(("oldest", "newest")):
        pins = dict(pin.split("==") for pin in corners.CORNERS[corner].packages if "==" in pin)
        assert numbers(pins["torch"])[:2] == numbers(torch_versions.TESTED[i])
        assert pins["deepspeed"] == versions.TESTED[i]


@pytest.mark.parametrize("name", corners.CORNERS)
def test_the_table_has_a_row_for_every_corner(name: str) -> None:
    """With its Python and every version that it pins."""
    corner = corners.CORNERS[name]
    (row,) = [line for line in TABLE.splitlines() if line.startswith(f"| {name} ")]
    for version in (corner.python, *(pin.partition("==")[2] for pin in corner.packages if "==" in pin)):
        assert version in row, version
