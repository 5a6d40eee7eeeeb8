"""Tests hand fakes in as arguments: replaced attributes of this project's own modules may only become fewer."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# Replaced attributes by file. Lower a number when you remove one; a new one is not allowed.
LEFT = {
    "conftest.py": 1,
    "dicom/test_index.py": 1,
    "experiments/test_simulate.py": 1,
    "infers/test_compiling.py": 2,
    "infers/test_plan.py": 7,
    "infers/test_predictor.py": 1,
    "infers/test_task.py": 2,
    "networks/test_masked_autoencoder.py": 1,
    "server/http/test_auth.py": 1,
    "server/http/test_connections.py": 1,
    "server/work/test_hold.py": 1,
    "server/work/test_jobs.py": 1,
    "trainers/test_datasets.py": 2,
    "trainers/test_loop.py": 3,
}
# Modules that belong to others, also where they are reached through one of ours (``datasets.shutil``).
FOREIGN = sys.stdlib_module_names | {"torch", "psutil", "settings"}


def _imported(tree: ast.Module) -> dict[str, str]:
    """Names that a test file imports, and from which module."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: str(node.module) for alias in node.names}
    return names


def _is_own(target: ast.expr, imported: dict[str, str]) -> bool:
    """Whether what is replaced belongs to this project; a local variable counts as its own."""
    path = target.value if isinstance(target, ast.Constant) else ast.unparse(target)
    parts = str(path).split(".")
    if FOREIGN & set(parts):
        return False
    origin = imported.get(parts[0], "lib" if not isinstance(target, ast.Constant) else parts[0])
    return origin.split(".")[0] in {"lib", "apps"}


def _count(path: Path) -> int:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    replaced = [call.args[0] for call in calls if ast.unparse(call.func) == "monkeypatch.setattr"]
    return sum(_is_own(target, _imported(tree)) for target in replaced)


def test_replaced_attributes_of_this_project_only_become_fewer() -> None:
    counts = {path.relative_to(TESTS).as_posix(): _count(path) for path in sorted(TESTS.rglob("*.py"))}
    more = {name: count for name, count in counts.items() if count > LEFT.get(name, 0)}
    assert not more, "hand the fake in as an argument"
