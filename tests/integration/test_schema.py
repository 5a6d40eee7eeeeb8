"""Schemathesis draws requests from the server's own OpenAPI document: none may be answered with a 5xx."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from synthetic_hippocampus import SyntheticCase

from tests.integration.conftest import prepare
from tests.integration.server import Server

# These would start long work; test_training and test_more_routes do.
LONG_WORK = "^/train/|^/batch/infer/"
REQUESTS_A_CALL = "8"

pytestmark = pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis needs Python 3.11")


@pytest.fixture
def server(tmp_path: Path, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server of its own: what is drawn also skips cases, removes images and adds labels."""
    server = prepare(Server(tmp_path / "server", {"models": "hippocampus_mr"}), cases).start()
    yield server
    assert server.stop() in (0, -15)


def test_no_request_of_the_documented_kinds_is_answered_5xx(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
    command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--seed", "1"]
    command += ["--max-examples", REQUESTS_A_CALL, "--exclude-path-regex", LONG_WORK]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:]
    passed = re.search(r"(\d+) generated, (\d+) passed", ended.stdout)
    assert passed is not None and int(passed[1]) == int(passed[2]) > 500
    assert server.get("/info/").status_code == 200
