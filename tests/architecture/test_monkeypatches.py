"""Tests hand fakes in as arguments: no test replaces an attribute of this project's own modules."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
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


def _replaced(path: Path) -> list[str]:
    """What a test file replaces of this project's own, with ``monkeypatch`` or with one of its contexts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    targets = [call.args[0] for call in calls if ast.unparse(call.func) in ("monkeypatch.setattr", "patch.setattr")]
    return [ast.unparse(target) for target in targets if _is_own(target, _imported(tree))]


def test_no_test_replaces_an_attribute_of_this_project() -> None:
    replaced = {path.relative_to(TESTS).as_posix(): _replaced(path) for path in sorted(TESTS.rglob("*.py"))}
    assert not {name: targets for name, targets in replaced.items() if targets}, "hand the fake in as an argument"


def test_replaced_attributes_are_noticed_in_every_spelling(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(
        "import os\nfrom lib.infers import plan\n"
        "def test(monkeypatch, segmenter):\n"
        "    monkeypatch.setattr(plan, 'measure_windows', None)\n"
        "    monkeypatch.setattr('lib.dicom.index._read', None)\n"
        "    monkeypatch.setattr(segmenter.network, 'forward', None)\n"
        "    monkeypatch.setattr(os, 'fsync', None)\n"
        "    monkeypatch.setattr('torch.cuda.device_count', None)\n"
        "    with monkeypatch.context() as patch:\n"
        "        patch.setattr(plan.Planner, 'plan', None)\n",
        encoding="utf-8",
    )
    assert _replaced(file) == ["plan", "'lib.dicom.index._read'", "segmenter.network", "plan.Planner"]
