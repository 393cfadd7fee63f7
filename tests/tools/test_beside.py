"""The wheel can be installed beside each tool: pip finds versions that suit both. Needs the network, and minutes."""

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


@pytest.mark.parametrize("tool", TOOLS)
def test_pip_resolves(wheel: Path, tmp_path: Path, tool: str) -> None:
    """Into an empty environment; nothing is installed."""
    report = tmp_path / "report.json"
    line = [*PIP, "install", "--dry-run", "--ignore-installed", "--report", report, wheel, tool]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installs = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    versions = {one["name"].lower().replace("_", "-"): one["version"] for one in installs}
    print(f"{tool} {versions[tool]}, torch {versions.get('torch')}")
    assert "alphaadam-dist" in versions
