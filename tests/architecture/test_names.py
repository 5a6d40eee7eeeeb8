"""Names are nouns and verbs of the field: no variable or function is called by a bare participle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2] / "lib"
# What such a name holds is left to guesses: an answer's payload, records, a match, what was reported before.
REFUSED = {"said", "told", "found", "familiar", "promised"}


def _words(name: str) -> set[str]:
    return set(name.lower().split("_"))


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each function, class, argument, variable and attribute that is made in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def _refused(text: str) -> list[tuple[int, str]]:
    return [(line, name) for line, name in _names(ast.parse(text)) if _words(name) & REFUSED]


def test_names_say_what_they_hold() -> None:
    modules = {path.relative_to(LIBRARY).as_posix(): path for path in sorted(LIBRARY.rglob("*.py"))}
    refused = {
        f"{name}:{line}": word
        for name, path in modules.items()
        for line, word in _refused(path.read_text(encoding="utf-8"))
    }
    assert not refused, "name what it holds"


def test_such_names_are_noticed_wherever_they_are_made() -> None:
    text = "class Found:\n    said: int = 0\n\ndef f(told, *, x):\n    x.found_at = [promised for promised in told]\n"
    assert sorted(_refused(text)) == [(1, "Found"), (2, "said"), (4, "told"), (5, "found_at"), (5, "promised")]
