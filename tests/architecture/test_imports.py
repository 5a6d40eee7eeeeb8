"""The rules of the house, read from the imports: who knows MONAI Label, and which way the arrows point.

server, main -> task -> parts -> models -> cases, datastore -> transforms, networks -> dicom -> configs -> storage
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.forks import run_code

REPOSITORY = Path(__file__).resolve().parents[2]

# A room imports rooms of lower levels only.
LEVELS = {
    "errors": 0,
    "storage": 1,
    "drawing": 1,
    "commandline": 1,
    "configs": 2,
    "imagefiles": 2,
    "dicom": 3,
    "transforms": 4,
    "networks": 4,
    "datastore": 5,
    "cases": 5,
    "models": 6,
    "infers": 7,
    "trainers": 8,
    "cluster": 8,
    "interaction": 9,
    "activelearning": 9,
    "experiments": 10,
    "server": 10,
    "doctor": 10,
}
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("lib", "apps")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
    # MONAI Label makes model, lib, logs and bin folders inside the app's.
    if not {"logs", "bin", "model"} & set(path.relative_to(REPOSITORY).parts)
}
LIBRARY = [name for name in MODULES if name.startswith("lib")]


@cache
def _nodes(module: str) -> tuple[ast.AST, ...]:
    """All nodes of a module, its tree first; several tests look at each module."""
    return tuple(ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"), filename=module)))


def _tree(module: str) -> ast.Module:
    tree = _nodes(module)[0]
    assert isinstance(tree, ast.Module)
    return tree


@cache
def _imports(module: str) -> tuple[str, ...]:
    """Full names of what a module imports, also inside its functions."""
    names: list[str] = []
    for node in _nodes(module):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.append(full if full in MODULES else str(node.module))
    return tuple(names)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


WRAP_MONAI_LABELS_DATASTORE = ("lib.datastore.store", "lib.datastore.series", "lib.datastore.batch")


def _may_know_monai_label(module: str) -> bool:
    if module.startswith("apps."):
        return module.endswith(".main")
    return _is_task(module) or _room(module) == "server"


def _is_task(module: str) -> bool:
    """What subclasses MONAI Label's own classes: the tasks, and the modules around its datastore."""
    return module.endswith(".task") or module in WRAP_MONAI_LABELS_DATASTORE


def test_modules_are_found() -> None:
    assert "lib.configs.preset" in MODULES
    assert "apps.unetr_radiology.main" in MODULES
    assert len(LIBRARY) > 30


@pytest.mark.parametrize("module", list(MODULES))
def test_monai_label_is_known_to_the_tasks_the_app_and_the_server_only(module: str) -> None:
    knows = [name for name in _imports(module) if name.split(".")[0] == "monailabel"]
    assert not knows or _may_know_monai_label(module), f"{module} imports {knows}"


def test_every_room_has_its_level() -> None:
    rooms = {_room(module) for module in LIBRARY} - {""}
    assert rooms <= LEVELS.keys(), "give a new room its level here"


@pytest.mark.parametrize("module", LIBRARY)
def test_arrows_point_one_way(module: str) -> None:
    own = _room(module)
    for name in _imports(module):
        if not name.startswith("lib") or not own:
            continue
        other = _room(name)
        assert other == own or LEVELS[other] < LEVELS[own], f"{module} imports {name}"


@pytest.mark.parametrize(
    "module", [m for m in LIBRARY if _room(m) != "server" and m not in WRAP_MONAI_LABELS_DATASTORE]
)
def test_parts_do_not_know_their_task(module: str) -> None:
    assert not [name for name in _imports(module) if name.startswith("lib.") and _is_task(name)]


def test_modules_of_a_room_do_not_import_in_circles() -> None:
    graph = {module: {name for name in _imports(module) if name in MODULES} for module in LIBRARY}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in LIBRARY:
        visit(module, ())


def test_no_folder_has_more_than_eighteen_modules_on_one_floor() -> None:
    floors = Counter(MODULES[module].parent for module in LIBRARY if MODULES[module].name != "__init__.py")
    assert not {str(folder.relative_to(REPOSITORY)): count for folder, count in floors.items() if count > 18}


def test_no_module_is_called_utils() -> None:
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [name for name in MODULES if vague & set(name.split("."))]


def _is_program(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


@pytest.mark.parametrize("module", LIBRARY)
def test_library_raises_instead_of_ending_the_process(module: str) -> None:
    tree = _tree(module)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ends = [f"line {node.lineno}" for node in calls if ast.unparse(node.func) in {"exit", "quit", "sys.exit"}]
    assert not ends or _is_program(tree)


@pytest.mark.parametrize("module", LIBRARY)
def test_library_has_no_bare_except(module: str) -> None:
    handlers = [node for node in _nodes(module) if isinstance(node, ast.ExceptHandler)]
    assert not [f"line {node.lineno}" for node in handlers if node.type is None]


@pytest.mark.parametrize("module", LIBRARY)
def test_library_asserts_only_what_the_type_checker_cannot_see(module: str) -> None:
    """``assert x is not None`` tells mypy what is known; input is checked by raising, which python -O keeps."""
    asserts = [node for node in _nodes(module) if isinstance(node, ast.Assert)]
    assert not [f"line {node.lineno}" for node in asserts if not ast.unparse(node.test).endswith("is not None")]


@pytest.mark.parametrize("module", list(MODULES))
def test_module_and_public_names_say_what_they_are(module: str) -> None:
    tree = _tree(module)
    assert ast.get_docstring(tree), f"{module} has no docstring"
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    ]
    assert not [node.name for node in public if not ast.get_docstring(node)]


def test_parts_run_without_monai_label(tmp_path: Path) -> None:
    """In a notebook, say: everything but the tasks and the server, in a process that has imported the libraries."""
    parts = [m for m in LIBRARY if not _may_know_monai_label(m) and not m.endswith("__main__")]
    code = f"import sys, {', '.join(parts)}; print('lib.infers.plan' in sys.modules, 'monailabel' in sys.modules)"
    assert run_code(code, tmp_path).split()[-2:] == ["True", "False"]


def test_launcher_needs_nothing_installed() -> None:
    for path in (REPOSITORY / "run.py", *(REPOSITORY / "launcher").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "launcher"}, path
