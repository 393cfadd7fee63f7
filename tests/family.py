"""The optimizer that docs/algorithm.md adds to the family, made of the text that is printed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "docs" / "algorithm.md"


def _printed() -> dict[str, Any]:
    code = DOCUMENT.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


AlphaSignum: Any = _printed()["AlphaSignum"]
