"""Every test and file that the documents name exists, and what they say was measured stands in the results."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from alphaadam_dist import __version__

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
FILE = re.compile(
    r"(?<![\w/])((?:ds_configs|accelerate_configs|launch|docs|benchmarks)/[\w./-]+\.(?:json|yaml|sh|sbatch|py|md))"
)
LINK = re.compile(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)")
INTERVAL = re.compile(r"(\d+\.\d+) ± (\d+\.\d+)")


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_differences_with_an_interval_are_in_a_table_of_the_results(document: Path):
    measured = {found for path in ROOT.glob("benchmarks/results/*.md") for found in INTERVAL.findall(path.read_text())}
    assert set(INTERVAL.findall(" ".join(document.read_text().split()))) <= measured


REPOSITORY = re.findall(r'^Homepage = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[0]
OF_THE_REPOSITORY = re.compile(
    re.escape(REPOSITORY).replace("github", "(?:github|raw.githubusercontent)", 1)
    + r"/(?:(?:blob|tree)/)?main/([^)\s\"#]+)(?:#([^)\s]+))?"
)


def test_the_readme_can_be_read_on_a_package_index():
    """There only whole addresses lead somewhere. Those of this repository lead to files that are in it."""
    text = (ROOT / "README.md").read_text()
    assert not [path for path, _ in LINK.findall(text) if path]
    used, defined = (
        set(re.findall(r"\]\[([^\]]+)\]", text)),
        set(re.findall(r"^\[([^\]]+)\]: http", text, flags=re.MULTILINE)),
    )
    assert used == defined
    assert len(re.findall(r"!\[[^\]]*\]\(https://raw\.githubusercontent\.com/", text)) == text.count("![") > 0
    found = OF_THE_REPOSITORY.findall(text + (ROOT / "pyproject.toml").read_text())
    assert len(found) > 15
    for path, anchor in found:
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(ROOT / path), f"{path}#{anchor}"


def test_the_readme_begins_with_what_it_is_for_and_how_to_install_it():
    text = (ROOT / "README.md").read_text()
    assert text.index("It is for people") < text.index("pip install alphaadam-dist") < text.index("## ")
    for word in ("evidence", "agreement", "scope"):
        assert text.index(f"*{word}*") == text.index(word) - 1, f"{word} is used before it is explained"


def test_the_workflow_runs_what_is_run_anywhere_and_builds_the_wheel():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    run = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in run
    assert any("pip wheel" in line for line in run)


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"], citation["repository-code"]) == (__version__, "MIT", REPOSITORY)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@pytest.mark.slow
def test_the_table_of_combinations_is_what_the_tests_try():
    """It imports DeepSpeed. `python -m tests.combinations` writes it anew."""
    from tests import combinations

    assert combinations.PAGE.read_text() == combinations.page()
