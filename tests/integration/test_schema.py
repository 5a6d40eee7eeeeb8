"""Schemathesis draws requests from the server's own OpenAPI document: none may be answered with a 5xx."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from synthetic_hippocampus import SyntheticCase

from lib.server.http.tokens import add_token
from tests.integration.conftest import prepare
from tests.integration.server import Server

# These would start long work; test_training and test_more_routes do.
LONG_WORK = "^/train/|^/batch/infer/"
REQUESTS_A_CALL = 8
# The longer run: requests a call, as whom ("": without tokens, on a server that asks for none), and the seed.
MORE_REQUESTS = 25
ROLES = ("", "annotator", "reviewer", "admin")

pytestmark = pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis needs Python 3.11")


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path, cases: dict[str, SyntheticCase]) -> Iterator[Serve]:
    """Starts a server of its own: what is drawn also skips cases, removes images and adds labels."""
    started: list[Server] = []

    def start(**conf: str) -> Server:
        started.append(prepare(Server(tmp_path / "server", {"models": "hippocampus_mr"} | conf), cases))
        return started[0].start()

    yield start
    assert started[0].stop() in (0, -15)


def draw(server: Server, folder: Path, examples: int, seed: int, *options: str) -> tuple[int, int]:
    """How many requests were drawn and answered, and how many of the answers were no 5xx."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
    command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--seed", str(seed)]
    command += ["--max-examples", str(examples), "--exclude-path-regex", LONG_WORK, *options]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout[-8000:]
    passed = re.search(r"(\d+) generated, (\d+) passed", ended.stdout)
    assert passed is not None
    return int(passed[1]), int(passed[2])


def test_no_request_of_the_documented_kinds_is_answered_5xx(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    drawn, passed = draw(server, tmp_path, REQUESTS_A_CALL, 1)
    assert drawn == passed > 500
    assert server.get("/info/").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_no_request_of_any_role_is_answered_5xx(serve: Serve, tmp_path: Path, role: str) -> None:
    tokens, options = tmp_path / "tokens.yaml", []
    if role:
        options = ["--header", f"Authorization: Bearer {add_token(tokens, 'anna', role)}"]  # type: ignore[arg-type]
    server = serve(**({"tokens": str(tokens)} if role else {}))
    drawn, passed = draw(server, tmp_path, MORE_REQUESTS, 20 + ROLES.index(role), *options)
    print(f"{role or 'everybody'}: {drawn} requests")
    assert drawn == passed > 1000
    assert server.get("/healthz").status_code == 200
    assert "Traceback" not in server.log.read_text()
