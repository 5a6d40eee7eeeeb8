"""What whoever runs the server sees: start, health, figures, a full queue, and no 5xx whatever is sent."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_hippocampus import SyntheticCase

from tests.certificate import make_certificate
from tests.integration.conftest import encode, prepare
from tests.integration.server import MAIN, Server, parse_multipart, read_nrrd, wait_until


def figures(server: Server) -> dict[str, float]:
    lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_health_and_readiness(server: Server) -> None:
    assert server.get("/healthz").json() == {"status": "ok"}
    ready = server.ready()
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready", "problems": [], "warnings": [],
        "models": {"hippocampus_mr": "shipped", "tiny": "untrained"},
    }  # fmt: skip


def test_damaged_weights_make_the_server_not_ready(server: Server) -> None:
    file = server.models / "tiny" / "shipped.pt"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"half a file")
    try:
        answer = server.ready()
        assert answer.status_code == 503
        assert answer.json()["problems"][0].startswith("model 'tiny': checkpoint 'shipped.pt'")
        refused = server.infer("tiny", "case_0")
        assert (refused.status_code, refused.json()["error"]) == (409, "ModelNotReadyError")
    finally:
        file.unlink()
    assert server.ready().status_code == 200


@pytest.fixture(scope="module")
def computing(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server that computes every answer, by OpenVINO once that is compiled, and lets two requests wait."""
    conf = {"engine": "auto", "precision": "fp32", "result_cache_mib": "0", "queue_size": "2"}
    server = prepare(Server(tmp_path_factory.mktemp("computing"), conf), cases).start()
    yield server
    assert server.stop() in (0, -15)


def test_server_that_compiles_answers_meanwhile_and_the_same_after(computing: Server, tmp_path: Path) -> None:
    """Which of the two computes in the end depends on the machine; that it is the one of the log does not."""
    first = computing.infer("hippocampus_mr", "case_0")
    chosen = re.compile(r"hippocampus_mr: windows by (\w+); OpenVINO takes [\d.]+ s for one")
    wait_until(lambda: chosen.search(computing.log.read_text(encoding="utf-8")))
    second = computing.infer("hippocampus_mr", "case_0")
    assert first.status_code == second.status_code == 200
    found = chosen.search(computing.log.read_text(encoding="utf-8"))
    parts = [parse_multipart(answer) for answer in (first, second)]
    engines = [json.loads(part["params"][1])["plan"]["engine"] for part in parts]
    assert found is not None and engines == ["pytorch", found[1]]
    masks = [read_nrrd(part["image"][1], tmp_path)[0] for part in parts]
    np.testing.assert_array_equal(masks[0], masks[1])


def test_metrics_count_requests_inferences_and_labels(
    server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    before = figures(server)
    constant = encode(np.full_like(cases["case_0"].image, 7), cases["case_0"].affine_ras, tmp_path)
    assert server.infer("hippocampus_mr", "case_0").status_code == 200
    assert server.infer("hippocampus_mr", "nope").status_code == 404
    assert server.post("/infer/hippocampus_mr", files={"file": ("a.nii.gz", constant)}).status_code == 422
    after = figures(server)

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)  # what has never been counted is not there

    route = 'unetr_requests_total{method="POST",route="/infer/{model}",status="%d"}'
    assert [grown(route % status) for status in (200, 404, 422)] == [1, 1, 1]
    ready = 'unetr_result_cache_total{model="hippocampus_mr",ready="%s"}'
    computed, known = grown(ready % "miss") if ready % "miss" in after else 0, after.get(ready % "hit", 0)
    assert computed + known - before.get(ready % "hit", 0) == 1
    assert grown('unetr_inference_seconds_count{model="hippocampus_mr",stage="network"}') == computed
    assert grown('unetr_inference_failures_total{error="ImageError",model="hippocampus_mr"}') == 1
    assert after["unetr_images"] == len(cases)
    assert after["unetr_inferences_waiting"] == 0
    assert after["unetr_disk_free_bytes"] > 0
    # no label holds what a client made up
    assert not any("nope" in name for name in after)


def test_full_queue_is_answered_503_and_others_go_on(computing: Server) -> None:
    assert computing.infer("hippocampus_mr", "case_0").status_code == 200
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(computing.infer("hippocampus_mr", "case_0"))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    waits = []
    while any(thread.is_alive() for thread in threads):
        start = time.monotonic()
        assert computing.get("/healthz").status_code == 200
        waits.append(time.monotonic() - start)
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503} and statuses.count(200) >= 3
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"] == "BusyError"
    assert len(waits) > 5, "other requests waited for inferences"


@pytest.mark.parametrize(
    ("conf", "sentence"),
    [
        ({"nope": "1"}, "unknown key 'nope'"),
        ({"queue_size": "-1"}, "queue_size"),
        ({"tokens": "none.yaml"}, "'none.yaml' cannot be read"),
        ({"cors_origins": "*"}, "cors_origins.0' is '*'"),
        ({"preset": "object.yaml"}, "'object.yaml' is not YAML: could not determine a constructor for the tag"),
        ({"preset": "aliases.yaml"}, "'aliases.yaml' is not YAML: an alias (*) stands inside of what it names"),
    ],
)
def test_wrong_setting_ends_the_start_with_a_sentence(tmp_path: Path, conf: dict[str, str], sentence: str) -> None:
    server = Server(tmp_path / "server", conf)
    (server.folder / "object.yaml").write_text("!!python/object/apply:os.system ['true']\n")
    (server.folder / "aliases.yaml").write_text("labels: &a [*a]\n")
    assert server.launch().wait(60) != 0
    said = server.log.read_text()
    assert re.search(rf"The server does not start: .*{re.escape(sentence)}", said)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("conf", "options", "sentence"),
    [
        ({"model_dir": "occupied"}, [], "(file exists|not a directory): .*occupied"),
        ({"model_dir": "occupied/models"}, [], "not a directory: .*occupied/models"),
        ({}, ["--ssl_keyfile", "none.key", "--ssl_certfile", "none.crt"], ".*no such file or directory"),
    ],
)
def test_failure_that_is_no_wrong_setting_ends_the_start_with_a_sentence_too(
    tmp_path: Path, conf: dict[str, str], options: list[str], sentence: str
) -> None:
    """The stack trace is in the log's file, where somebody looks who wants more than the sentence."""
    server = Server(tmp_path / "server", conf, options=options, module="lib.server")
    (server.folder / "occupied").write_text("")
    process = server.launch()
    try:
        assert process.wait(60) not in (0, -15)
    finally:
        process.kill()
    said = server.log.read_text()
    assert re.search(rf"(?i)The server does not start: {sentence}.*; the log has the details", said), said[-2000:]
    assert "Traceback" not in said
    kept = (MAIN.parent / "logs" / "app.log").read_text(encoding="utf-8", errors="replace")
    assert "the server does not start\nTraceback" in kept


def test_half_open_handshakes_keep_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More clients that connect to the TLS port and say nothing than there may be connections."""
    key, certificate = make_certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    conf = {"header_seconds": "2", "connection_limit": "40", "client_connection_limit": "20"}
    server = Server(tmp_path / "server", conf, options=["--ssl_keyfile", str(key), "--ssl_certfile", str(certificate)])
    server.url = server.url.replace("http://", "https://")
    server.start()
    try:
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(150)]
        assert server.get("/healthz").status_code == 200
        silent[-1].settimeout(20)
        assert silent[-1].recv(1) == b"", "the last one is closed when its time is over"
        assert server.get("/healthz").status_code == 200
        for each in silent:
            each.close()
    finally:
        server.stop()


JUNK = ("", "x", "-1", "1e999", "..", "../x", "a" * 3000, "%00", "\u00e4\u6f22", "null", "[]", '{"a": 1}', "true")
# these would start long work, which has tests of its own
LONG_WORK = {("post", "/train/"), ("post", "/train/{model}"), ("post", "/batch/infer/{model}")}


def calls(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Every operation of the document with junk in each of its parameters, body fields and files."""
    made = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if (method, path) in LONG_WORK:
                continue
            for junk in JUNK:
                places = re.sub(r"\{\w+\}", lambda _, junk=junk: junk.replace("/", "%2f") or "x", path)
                query = {p["name"]: junk for p in operation.get("parameters", []) if p["in"] == "query"}
                content = operation.get("requestBody", {}).get("content", {})
                options: dict[str, Any] = {"params": query}
                if "multipart/form-data" in content:
                    options |= {"files": {name: ("a.nii.gz", junk.encode()) for name in ("file", "files", "label")}}
                    options |= {"data": {"params": junk, "info": junk}}
                elif "application/x-www-form-urlencoded" in content:
                    options |= {"data": {name: junk for name in ("params", "info", "username", "password")}}
                elif content:
                    options |= {"data": junk.encode()}
                made.append((method.upper(), places, options))
    return made


def test_no_junk_in_any_documented_call_is_answered_5xx(server: Server) -> None:
    document = server.get("/openapi.json").json()
    sent = calls(document)
    assert len(sent) > 400
    failed = []
    for method, path, options in sent:
        answer = server.request(method, path, **options)
        if answer.status_code >= 500:
            failed.append((method, path, options["params"], answer.text[:200]))
        if method != "HEAD" and answer.status_code >= 400:
            assert set(answer.json()) == {"detail", "error", "request_id"}, (method, path)
    assert failed == []


def test_ids_of_refusals_are_all_different(server: Server) -> None:
    ids = [server.get("/nope").json()["request_id"] for _ in range(20)]
    assert all(a != b for a, b in itertools.combinations(ids, 2))


def test_answers_are_strict_json(server: Server) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for path in ("/info/", "/datastore/", "/datastore/?output=all", "/datastore/?output=train", "/readyz"):
        json.loads(server.get(path).text, parse_constant=refuse)
