"""The wheel can be installed beside each tool: pip finds versions that suit both, and downgrades nobody's torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("axolotl", "llamafactory", "ms-swift", "torchtune", "lightning", "trl")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

pytestmark = [pytest.mark.tools, pytest.mark.timeout(2000)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


def resolved(report: Path, *wanted: str | Path) -> dict[str, str]:
    """Name -> version of what pip would install into an empty environment. Installs nothing."""
    line = [*PIP, "install", "--dry-run", "--ignore-installed", "--report", report, *wanted]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installs = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    return {one["name"].lower().replace("_", "-"): one["version"] for one in installs}


@pytest.mark.parametrize("tool", TOOLS)
def test_pip_resolves(wheel: Path, tmp_path: Path, tool: str) -> None:
    both = resolved(tmp_path / "both.json", wheel, tool)
    print(f"{tool} {both[tool]}, torch {both.get('torch')}")
    assert "alphaadam-dist" in both
    alone = resolved(tmp_path / "alone.json", tool)
    assert {name: both[name] for name in alone} == alone, "the wheel changes versions that the tool gets without it"
