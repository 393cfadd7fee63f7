"""What `make test` leaves to the night: the cases of a slow test that show nothing new."""

import pytest

pytest_plugins = ["pytester"]

GRID = """
import pytest
from tests.marks import leave_to_nightly

@pytest.mark.parametrize("options", [{"a": 1}, {"a": 2}])
@pytest.mark.parametrize("mode", [0, *(pytest.param(mode, marks=pytest.mark.slow) for mode in (1, 2))])
def test_grid(mode, options):
    pass

@pytest.mark.slow
@pytest.mark.parametrize("size", [10**5000, 1], ids=["huge", "one"])
def test_each_value(size):
    pass

def test_alone():
    pass
"""


def test_a_case_stays_where_it_shows_a_value_first(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    nightly")
    pytester.makeconftest(
        "import pytest\nfrom tests.marks import leave_to_nightly\n"
        "@pytest.hookimpl(tryfirst=True)\ndef pytest_collection_modifyitems(items): leave_to_nightly(items)"
    )
    pytester.makepyfile(GRID)
    collected = pytester.runpytest_inprocess("--collect-only", "-q", "-m", "nightly")
    nightly = [line.rpartition("::")[2] for line in collected.outlines if "::" in line]
    assert nightly == ["test_grid[1-options1]", "test_grid[2-options1]"]
