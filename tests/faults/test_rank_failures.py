"""A rank is killed or hangs: nobody waits for ever, and the error names what failed, where, and who is missing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alphaadam_dist import rank_failures

from .losing_ranks import CASES, HANDSHAKE, LOST_AT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, str]]:
    command = [sys.executable, "-m", "tests.faults.losing_ranks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    said: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("case", [case for case in CASES if "host" not in case])
def test_the_others_say_who_is_missing(said: dict[str, dict[str, str]], case: str) -> None:
    what = "check that the ranks agree before" if "replica" in case else "all-reduce of the counts of"
    assert set(said[case]) == {"0", "2"}
    for rank, error in said[case].items():
        # a delayed step may be under way still where the next one begins
        assert re.match(
            rf"RankLost: AlphaAdam.s {what} this process.s step [{LOST_AT}{LOST_AT + 1}] failed on rank {rank} ", error
        )
        assert "of ranks 0, 1, 2; not heard from: rank 1, which died, hangs, or waits" in error
        assert "or did not call step() this time (skipped it for a bad loss or an error of its own" in error
    if case == "hung":
        assert all("Timed out" in error for error in said[case].values())


@pytest.mark.parametrize("question", HANDSHAKE)
def test_of_the_handshake_too(said: dict[str, dict[str, str]], question: str) -> None:
    assert set(said[question]) == {"0", "2"}
    for rank, error in said[question].items():
        assert f"AlphaAdam's handshake ({question}) failed on rank {rank} of ranks 0, 1, 2" in error
        assert "not heard from: rank 1, which died, hangs, or waits" in error


def test_without_the_store_that_is_said(said: dict[str, dict[str, str]]) -> None:
    errors = said["killed-host-of-the-store"]
    assert set(errors) == {"1", "2"}
    for error in errors.values():
        assert "the store through which the ranks met is gone as well: rank 0, or its launcher, died" in error


def test_of_many_ranks_a_few_are_named() -> None:
    assert rank_failures.people([3]) == "rank 3"
    assert rank_failures.people([0, 2]) == "ranks 0, 2"
    assert rank_failures.people(range(4096)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (4096)"
