"""Schemathesis draws requests from the server's own OpenAPI document: none may be answered with a 5xx, nor do more."""

from __future__ import annotations

import json
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
# The longer runs.
MORE_REQUESTS = 16
ROLES = ("annotator", "reviewer", "admin")
# Who may do what, but for what everybody may who has a token; lowest role by operation.
LEAST_ROLE = {
    **dict.fromkeys(
        (
            "POST /train/", "POST /train/{model}", "DELETE /train/", "POST /retrain/{model}",
            "POST /datastore/label/versions/{version}/restore", "GET /datastore/quarantine",
            "GET /datastore/quarantine/{name}", "POST /model/versions/{model}/{version}/serve",
        ),
        "reviewer",
    ),
    **dict.fromkeys(
        (
            "GET /model/{model}", "PUT /model/{model}", "DELETE /model/{model}", "GET /model/info/{model}",
            "POST /model/rollback/{model}", "GET /logs/", "GET /logs/gpu", "DELETE /datastore/image",
            "DELETE /datastore/label",
        ),
        "admin",
    ),
}  # fmt: skip

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
def test_no_request_of_anybody_is_answered_5xx_where_no_token_is_asked_for(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    drawn, passed = draw(server, tmp_path, MORE_REQUESTS, 20)
    print(f"everybody: {drawn} requests")
    assert drawn == passed > 1000
    assert server.get("/healthz").status_code == 200
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_no_request_of_any_role_is_answered_5xx_and_each_may_do_what_it_should(serve: Serve, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    known = {role: add_token(tokens, role, role) for role in ROLES}  # type: ignore[arg-type]
    server = serve(tokens=str(tokens))
    for seed, role in enumerate(ROLES, start=21):
        drawn, passed = draw(server, tmp_path, MORE_REQUESTS, seed, "--header", f"Authorization: Bearer {known[role]}")
        print(f"{role}: {drawn} requests")
        assert drawn == passed > 1000
    assert server.get("/healthz").status_code == 200
    assert "Traceback" not in server.log.read_text()
    answered = statuses(server)
    for role in ROLES:
        refused = {needs for needs, least in LEAST_ROLE.items() if ROLES.index(role) < ROLES.index(least)}
        for operation, codes in answered[role].items():
            if operation in refused:  # 400 and 413: a body that is none is refused before anybody asks whose it is
                assert codes <= {403, 400, 413} and 403 in codes, (role, operation, codes)
            else:
                assert codes - {403}, (role, operation, "is refused")
        assert answered[role].keys() >= {one for one in LEAST_ROLE if not re.search(LONG_WORK, one.split(" ")[1])}


def statuses(server: Server) -> dict[str, dict[str, set[int]]]:
    """The statuses that each role was answered with, by operation, as the log has them."""
    paths = server.get("/openapi.json").json()["paths"]
    known = [
        (re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), path) for path in sorted(paths, key=lambda one: "{" in one)
    ]
    found: dict[str, dict[str, set[int]]] = {role: {} for role in ROLES}
    for line in re.findall(r'{"request_id".*}', server.log.read_text(errors="replace")):
        said = json.loads(line)
        path = next((path for pattern, path in known if pattern.fullmatch(said["path"])), "")
        if said["user"] in found and said["method"].lower() in paths.get(path, {}):
            found[said["user"]].setdefault(f"{said['method']} {path}", set()).add(said["status"])
    return found
