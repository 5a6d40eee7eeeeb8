"""A part of the server is handed what it uses: functions that take all of ``Services`` may only become fewer."""

from __future__ import annotations

import ast
from pathlib import Path

SERVER = Path(__file__).resolve().parents[2] / "lib/server"
# Functions by file. Lower a number when you remove one; a new one is not allowed.
LEFT = {
    "labels/segmentations.py": 4,
    "labels/submissions.py": 7,
    "pages/case_routes.py": 10,
    "pages/case_view.py": 4,
    "pages/click_routes.py": 4,
    "pages/page_routes.py": 3,
    "pages/pool_view.py": 5,
    "routes/app.py": 10,
    "routes/datastore.py": 2,
    "routes/dicomweb.py": 9,
    "routes/infer.py": 12,
    "routes/labels.py": 1,
    "routes/ohif.py": 1,
    "routes/uncertainty.py": 1,
    "work/retraining.py": 1,
}


def _takes_all_services(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = {ast.unparse(argument.annotation) for argument in arguments if argument.annotation is not None}
    return bool(annotations & {"Parts", "Services"})


def _count(path: Path) -> int:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return sum(_takes_all_services(n) for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_functions_that_take_all_services_only_become_fewer() -> None:
    counts = {path.relative_to(SERVER).as_posix(): _count(path) for path in sorted(SERVER.rglob("*.py"))}
    more = {name: count for name, count in counts.items() if count > LEFT.get(name, 0)}
    assert not more, "name in the signature what is used (lib/server/dependencies.py)"
