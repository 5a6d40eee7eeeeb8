"""A server's pool over real HTTP: who is let in, what is told where it is not, and what is asked for."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from lib.cluster.remote import Access, PacsSource, Rest, ServerLabels, ServerSource
from lib.cluster.results import CaseResult
from lib.cluster.studies import open_source
from lib.errors import ConfigError, ConflictError, NotFoundError, UpstreamError
from tests.tiny import tiny_preset

PRESET = tiny_preset()
RESULT = CaseResult("a", "0" * 64, "tiny", "v0001", "1" * 64, "a.nii.gz", 0.1, {})


def _entry(ext: str, labels: dict[str, str] | None = None, **info: str) -> dict[str, Any]:
    kept = {tag: {"info": {"source": source}} for tag, source in (labels or {}).items()}
    return {"image": {"ext": ext, "info": info}, "labels": kept}


class Pool(ThreadingHTTPServer):
    """Answers as the server does, with a token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.token, self.role, self.status, self.bytes_sent = "secret", "annotator", 200, 8
        self.asked: list[str] = []
        self.objects = {
            "a": _entry(".nii.gz", {"original": "inference"}),
            "b": _entry(".nrrd", {"original": "rest"}),
            "1.2": _entry("", Modality="MR"),
            "1.3": _entry("", Modality="CT"),
        }


class _Handler(BaseHTTPRequestHandler):
    server: Pool

    def _answer(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        self.server.asked.append(f"{self.command} {address.path}")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._send(401, b'{"detail": "this server asks for a token"}')
        if address.path == "/info/":
            return self._send(200, b'{"models": {}}')
        if address.path == "/auth/token/valid":
            return self._send(200, json.dumps({"username": "anna", "roles": [self.server.role]}).encode())
        if address.path == "/datastore/":
            return self._send(200, json.dumps({"objects": self.server.objects}).encode())
        if address.path == "/datastore/image" and self.command == "HEAD":
            return self._send(200 if query["check_sum"] == ["SHA256:same"] else 404)
        if query.get("image") == ["gone"]:
            return self._send(404, b'{"detail": "there is none"}')
        if address.path == "/datastore/image":
            return self._send(200, b"contents"[: self.server.bytes_sent], 8)
        return self._send(self.server.status, b'{"detail": "a person drew it"}')

    do_GET = do_HEAD = do_PUT = _answer  # noqa: N815

    def _send(self, status: int, content: bytes = b"", length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def pool() -> Iterator[Pool]:
    server = Pool()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_token_is_read_from_a_file_or_the_environment_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file\n")
    assert Access.find(tmp_path / "token", {"UNETR_TOKEN": "from-environment"}).token == "from-file"
    found = Access.find(None, {"UNETR_TOKEN": "from-environment", "MONAI_LABEL_DICOMWEB_PASSWORD": "p"})
    assert found.token == "from-environment"
    assert "from-environment" not in repr(found) and "'p'" not in repr(found)
    with pytest.raises(ConfigError, match="cannot be read"):
        Access.find(tmp_path / "none", {})


def test_server_without_the_right_token_is_a_sentence_that_names_the_variable(pool: Pool) -> None:
    for access in (Access(), Access("wrong")):
        with pytest.raises(ConfigError, match=r"asks for a token.*UNETR_TOKEN"):
            open_source(pool.url, PRESET, access)


def test_pool_is_files_and_series_of_the_modality_without_what_a_person_drew(pool: Pool) -> None:
    source = open_source(pool.url + "/", PRESET, Access("secret"))
    assert isinstance(source, ServerSource) and source.cases() == ["1.2", "a", "b"]
    keeping = pickle.loads(pickle.dumps(open_source(pool.url, PRESET, Access("secret"), "original")))
    assert keeping.cases() == ["1.2", "a"] and keeping.drawn == ["b"]


def test_file_is_downloaded_whole_or_not_at_all_and_compared_by_the_server(pool: Pool, tmp_path: Path) -> None:
    source = ServerSource(Rest(pool.url, Access("secret")), PRESET)
    assert source.fetch("a", tmp_path).path.read_bytes() == b"contents"
    assert source.is_unchanged("a", "same", "") and not source.is_unchanged("a", "other", "")
    pool.bytes_sent = 3
    with pytest.raises(UpstreamError, match="broke off the image 'a'"):
        source.fetch("a", tmp_path)
    pool.objects["gone"] = _entry(".nii")
    with pytest.raises(NotFoundError, match="'gone'"):
        ServerSource(Rest(pool.url, Access("secret")), PRESET).fetch("gone", tmp_path)


def test_right_to_a_tag_is_checked_before_anything_is_computed(pool: Pool) -> None:
    rest = Rest(pool.url, Access("secret"))
    ServerLabels(rest, "original", PRESET).check()
    with pytest.raises(ConfigError, match=r"--save-labels final: 'anna' is annotator .* needed: reviewer or admin"):
        ServerLabels(rest, "final", PRESET).check()
    pool.role = "reviewer"
    ServerLabels(rest, "final", PRESET).check()
    with pytest.raises(ConfigError, match="valid: a tag of lower-case letters"):
        ServerLabels(rest, "../x", PRESET).check()


def test_mask_is_sent_once_and_a_refusal_has_the_servers_reason(pool: Pool, tmp_path: Path) -> None:
    mask = tmp_path / "a.nii.gz"
    mask.write_bytes(b"mask")
    send = ServerLabels(Rest(pool.url, Access("secret")), "original", PRESET)
    place = send(RESULT, mask)
    assert place == f"original at {pool.url}"
    asked = len(pool.asked)
    assert send(CaseResult(**{**vars(RESULT), "sent_to": place}), mask) == place and len(pool.asked) == asked
    pool.status = 409
    with pytest.raises(ConflictError, match="a person drew it"):
        send(RESULT, mask)


def test_address_with_a_query_is_a_pacs_and_masks_cannot_be_sent_there(pool: Pool) -> None:
    source = open_source(f"{pool.url}/dicom-web/series?StudyDate=20250101-", PRESET, Access("secret"))
    assert isinstance(source, PacsSource) and pool.asked == []
    with pytest.raises(ConfigError, match="is none"):
        open_source(f"{pool.url}/dicom-web?StudyDate=20250101-", PRESET, Access("secret"), "original")


def test_server_that_is_away_is_a_sentence() -> None:
    with pytest.raises(UpstreamError, match="does not answer"):
        open_source("http://127.0.0.1:9", PRESET, Access())
