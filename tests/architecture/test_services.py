"""A part of the server is handed what it uses: all services are named only where the server is put together."""

from __future__ import annotations

import ast
from pathlib import Path

SERVER = Path(__file__).resolve().parents[2] / "lib/server"
PUT_TOGETHER = {"app.py", "services.py", "dependencies.py"}
# They stand around the routes, or draw what every page shows, and ask for the authenticator alone.
AUTHENTICATING = {"http/auth.py", "http/origins.py", "pages/drawing.py"}


def _names(path: Path) -> set[str]:
    """All names that a module reads, imports or writes in an annotation."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return imported | {node.id for node in nodes if isinstance(node, ast.Name)}


def test_all_services_are_named_only_where_the_server_is_put_together() -> None:
    naming = {path.relative_to(SERVER).as_posix() for path in SERVER.rglob("*.py") if "Services" in _names(path)}
    assert naming == PUT_TOGETHER, "name in the signature what is used (lib/server/dependencies.py)"


def test_routes_and_rooms_take_no_services_from_the_running_app() -> None:
    reading = {path.relative_to(SERVER).as_posix() for path in SERVER.rglob("*.py") if _reads_state(path)}
    assert reading == {"app.py", "services.py"} | AUTHENTICATING


def _reads_state(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return any(ast.unparse(node).endswith(".state.services") for node in nodes if isinstance(node, ast.Attribute))
