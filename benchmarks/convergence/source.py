"""A name for what code does, so that a finished run is kept while only words about it change."""

from __future__ import annotations

import ast
import hashlib
from types import ModuleType


def digest(*modules: ModuleType) -> str:
    """The same for the same statements: comments, docstrings and layout do not count."""
    name = hashlib.sha256()
    for module in modules:
        assert module.__file__ is not None
        with open(module.__file__, encoding="utf-8") as file:
            name.update(statements(file.read()).encode())
    return name.hexdigest()[:16]


def statements(source: str) -> str:
    """The syntax tree of a file without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 0:
            node.body = [s for s in body if not _is_text(s)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    """Whether it is a string that stands by itself."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
