"""Every test and file that the documents name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
FILE = re.compile(
    r"(?<![\w/])((?:ds_configs|accelerate_configs|launch|docs|benchmarks)/[\w./-]+\.(?:json|yaml|sh|sbatch|py|md))"
)
LINK = re.compile(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)")


def anchors(document: Path) -> set[str]:
    """The places in a document that a link can name."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_tests_exist(document: Path):
    for path, name in TEST.findall(document.read_text()):
        assert (ROOT / path).is_file(), path
        tree = ast.parse((ROOT / path).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name in names, f"{path}::{name}"


def test_every_area_of_the_tests_is_in_the_table():
    text = (ROOT / "docs" / "how-it-is-tested.md").read_text()
    named = {Path(path).parts[1] for path, _ in TEST.findall(text)}
    assert named == {path.parent.name for path in ROOT.glob("tests/*/test_*.py")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_and_links_lead_somewhere(document: Path):
    text = document.read_text()
    for path in FILE.findall(text):
        assert (ROOT / path).is_file() or (document.parent / path).is_file(), path
    for path, anchor in LINK.findall(text):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
