"""The routes on images and labels of the studies, with a folder handed in: no server is started."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import ItemsView
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import nibabel
import numpy as np
import pytest
from fastapi import APIRouter

from lib.configs.settings import Settings
from lib.datastore.store import VersionedDatastore
from lib.server.dependencies import (
    get_check_image,
    get_datastore,
    get_image_file,
    get_image_inspector,
    get_presets,
    get_readers,
    get_settings,
    get_store,
)
from lib.server.downloads import send_file
from lib.server.http.names import check_image_known
from lib.server.readers import Readers
from lib.server.routes.datastore import router
from lib.server.work.image_checks import ImageInspector
from tests.server.in_process import InProcess
from tests.tiny import tiny_preset


def nifti(path: Path) -> Path:
    random = np.random.default_rng(3)
    nibabel.save(nibabel.Nifti1Image(random.normal(300, 50, (18, 18, 18)).astype(np.float32), np.eye(4)), path)
    return path


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    nifti(folder / "case_0.nii.gz")
    return folder


@pytest.fixture
def api(studies: Path) -> InProcess:
    store, presets = VersionedDatastore(str(studies)), {"tiny": tiny_preset()}
    services = {
        get_store: store,
        get_image_inspector: ImageInspector(store, presets, {}, lambda image: Path(store.get_image_uri(image))),
        get_datastore: store,
        get_check_image: lambda image: check_image_known(store, image),
        get_image_file: lambda image: Path(store.get_image_uri(image)),
        get_presets: presets,
        get_settings: Settings(),
        get_readers: Readers(1),
    }
    return InProcess(router, services)


def test_image_is_known_by_its_checksum(api: InProcess, studies: Path) -> None:
    digest = hashlib.sha256((studies / "case_0.nii.gz").read_bytes()).hexdigest()
    for check_sum, status in (("", 200), (f"SHA256:{digest}", 200), (digest, 200), ("SHA256:0", 404), ("CRC:0", 400)):
        path = f"/datastore/image?image=case_0&check_sum={check_sum}"
        assert api.request("HEAD", path).status_code == status, check_sum
    assert api.request("HEAD", "/datastore/image?image=case_9").status_code == 404


def test_image_that_is_added_is_listed_and_a_second_of_its_name_is_refused(api: InProcess, tmp_path: Path) -> None:
    content = nifti(tmp_path / "sent.nii.gz").read_bytes()
    file = {"file": ("sent.nii.gz", content, "application/gzip")}
    added = api.request("PUT", "/datastore/image?image=case_1", files=file)
    assert added.status_code == 200 and added.json() == {"image": "case_1", "warnings": []}
    assert api.request("GET", "/datastore/image?image=case_1").content == content
    assert api.request("GET", "/datastore/").json()["total"] == 2
    assert api.request("PUT", "/datastore/image?image=case_1", files=file).status_code == 409
    assert api.request("DELETE", "/datastore/image?id=case_1").status_code == 200
    assert api.request("GET", "/datastore/image?image=case_1").status_code == 404


def test_no_file_is_overwritten_whether_it_is_an_image_or_left_out(
    api: InProcess, studies: Path, tmp_path: Path
) -> None:
    """A link, a FIFO and a file that somebody had put there a moment before were replaced."""
    content = nifti(tmp_path / "sent.nii.gz").read_bytes()
    (tmp_path / "outside.nii.gz").write_bytes(b"another's")
    (studies / "link.nii.gz").symlink_to(tmp_path / "outside.nii.gz")
    os.link(tmp_path / "outside.nii.gz", studies / "hard.nii.gz")
    (studies / "new.nii.gz").write_bytes(b"being copied")
    for image in ("link", "hard", "new"):
        file = {"file": ("sent.nii.gz", content, "application/gzip")}
        refused = api.request("PUT", f"/datastore/image?image={image}", files=file)
        assert refused.status_code == 409 and f"'{image}.nii.gz' in the studies already" in refused.json()["detail"]
    assert (studies / "link.nii.gz").is_symlink()
    assert (studies / "hard.nii.gz").read_bytes() == b"another's"
    assert (studies / "new.nii.gz").read_bytes() == b"being copied"


def test_label_that_there_is_not_is_404(api: InProcess) -> None:
    for method, path in (("GET", "label?label="), ("HEAD", "label?image="), ("GET", "label/info?label=")):
        assert api.request(method, f"/datastore/{path}case_0").status_code == 404, path
    assert api.request("GET", "/datastore/dataset").status_code == 404


@pytest.mark.parametrize("taken", ['{"sequence": 1000000}', '{"sequence": "x"}', '{"sha256": "0"}', '{"user": "ben"}'])
def test_nothing_that_is_added_to_a_label_passes_for_its_version(
    api: InProcess, studies: Path, tmp_path: Path, taken: str
) -> None:
    """A sequence of one's own hid every later version, and one that is no number made each later save a 500."""
    store = api.app.dependency_overrides[get_store]()
    nibabel.save(nibabel.Nifti1Image(np.ones((18, 18, 18), np.uint8), np.eye(4)), tmp_path / "label.nii.gz")
    store.save_label("case_0", str(tmp_path / "label.nii.gz"), "final", {"user": "anna"})
    before = store.get_label_info("case_0", "final")
    for path, part in (("label/info", "info"), ("updatelabelinfo", "params")):
        refused = api.request("PUT", f"/datastore/{path}?label=case_0&tag=final", data={part: taken})
        assert refused.status_code == 400 and "other names than" in refused.json()["detail"]
    assert store.get_label_info("case_0", "final") == before
    added = api.request("PUT", "/datastore/label/info?label=case_0&tag=final", data={"info": '{"checked": true}'})
    assert added.status_code == 200
    told = store.get_label_info("case_0", "final")
    assert (told["checked"], told["changed_by"], told["user"]) == (True, "admin", "anna")


def test_information_does_not_grow_without_bound(api: InProcess) -> None:
    sent = [
        api.request("PUT", "/datastore/image/info?image=case_0", data={"info": f'{{"key{n}": "{"x" * 60_000}"}}'})
        for n in range(6)
    ]
    assert [answer.status_code for answer in sent] == [200] * 4 + [400] * 2
    assert "at most 262144 characters with what is known" in sent[-1].json()["detail"]


def test_image_that_no_model_can_segment_is_left_out_until_it_is_mended(api: InProcess, studies: Path) -> None:
    file = studies / "case_0.nii.gz"
    good = file.read_bytes()
    nibabel.save(nibabel.Nifti1Image(np.full((18, 18, 18), 7, np.float32), np.eye(4)), file)
    checked = api.request("POST", "/datastore/image/check?image=case_0").json()
    assert "constant" in checked["checks"]["tiny"]["problem"]
    assert list(api.request("GET", "/datastore/problems").json()["left_out"]["tiny"]) == ["case_0"]
    file.write_bytes(good)
    assert api.request("POST", "/datastore/image/check?image=case_0").json()["checks"]["tiny"]["problem"] == ""
    assert api.request("GET", "/datastore/problems").json()["left_out"] == {"tiny": {}}


class Listed(dict[str, Any]):
    """What a store tells, which notes the threads that look through it."""

    def __init__(self, **told: Any) -> None:
        super().__init__(told)
        self.threads: set[threading.Thread] = set()

    def items(self) -> ItemsView[str, Any]:
        self.threads.add(threading.current_thread())
        return super().items()


@pytest.mark.parametrize("output", ["all", "stats"])
def test_listing_is_written_beside_the_event_loop(output: str) -> None:
    told = Listed(objects={"case_0": {"image": {"ext": ".nii.gz"}}}, total=1)
    store = SimpleNamespace(json=lambda: told, status=lambda: told)
    answer = InProcess(router, {get_datastore: store}).request("GET", f"/datastore/?output={output}")
    assert answer.json() == dict(told)
    assert told.threads and threading.main_thread() not in told.threads


@pytest.mark.parametrize("chunk_size", [1, 10**6])
def test_download_is_the_file_as_it_was_announced_or_none(tmp_path: Path, chunk_size: int) -> None:
    """Whether it is small enough to be read at once, or is sent in pieces."""

    def ask(changed: bytes | None, headers: dict[str, str] | None = None) -> httpx.Response:
        file = tmp_path / "image.nii.gz"
        file.write_bytes(b"0123456789")
        download = send_file(file)
        download.chunk_size = chunk_size
        file.unlink() if changed is None else file.write_bytes(changed)
        router = APIRouter()
        router.add_api_route("/file", lambda: download)
        return InProcess(router, {}).request("GET", "/file", headers=headers)

    assert ask(b"0123456789").content == ask(b"0123456789 and more").content == b"0123456789"
    assert ask(b"0123456789").headers["content-length"] == "10"
    assert ask(None).content == b"0123456789", "it is open from the beginning"
    part = ask(b"0123456789", {"range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    if chunk_size > 10:
        assert ask(b"01234").status_code == 409
    else:
        with pytest.raises(RuntimeError, match="already started"):
            ask(b"01234")
