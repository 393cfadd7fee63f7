"""What comes of a combination, as a test tries it and docs/combinations.md shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        verdict: "served"; "refused" by this library; "impossible" where DeepSpeed or torch itself ends in an error.
        says: what the error matches.
        because: the same for the table, in a few words.
        given: what the test needs beside that, as a DeepSpeed config.
    """

    verdict: str
    says: str = ""
    because: str = ""
    given: dict[str, Any] = field(default_factory=dict)


def served(given: dict[str, Any] | None = None) -> Cell:
    return Cell("served", given=given or {})


def refused(says: str, because: str, given: dict[str, Any] | None = None) -> Cell:
    return Cell("refused", says, because, given or {})


def impossible(says: str, because: str, given: dict[str, Any] | None = None) -> Cell:
    return Cell("impossible", says, because, given or {})
