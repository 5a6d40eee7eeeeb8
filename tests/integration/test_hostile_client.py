"""A hostile client's requests: all refused with the right 4xx, and nothing on disk is changed."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Iterator
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from synthetic_hippocampus import SyntheticCase

from lib.server.http.tokens import add_token
from tests.integration.conftest import prepare
from tests.integration.server import MAIN, Server, fingerprint

PARAMS = json.dumps({"client_id": "mallory"})
ROLES = ("annotator", "reviewer", "admin")
SECRET = "secret.nii.gz"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("tokens") / "tokens.yaml"
    made = {role: add_token(file, f"{role}1", role) for role in ROLES}
    return made | {"file": str(file)}


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, str], cases: dict[str, SyntheticCase]
) -> Iterator[Server]:
    """A server with users, a file beside the studies that nobody may have, and a link to it among them."""
    folder = tmp_path_factory.mktemp("guarded")
    conf = {"tokens": tokens["file"], "upload_limit_mib": "1", "unpacked_limit_mib": "32", "queue_size": "4"}
    server = prepare(Server(folder, conf), cases)
    shutil.copy(server.studies / "case_0.nii.gz", folder / SECRET)
    (server.studies / "linked.nii.gz").symlink_to(folder / SECRET)
    os.mkfifo(server.studies / "fifo.nii.gz")
    os.link(folder / SECRET, server.studies / "hard.nii.gz")
    (server.studies / os.fsdecode(b"M\xfcller.nii.gz")).write_bytes(GOOD)
    (server.studies / "labels" / "final").mkdir(parents=True, exist_ok=True)
    (server.studies / "labels" / "final" / "plain.nii.gz").symlink_to(folder / SECRET)
    (server.studies / "detached.nrrd").write_bytes(disguised())
    plain = np.random.default_rng(2).normal(100, 20, (40, 50, 40)).astype(np.float32)
    nib.save(nib.Nifti1Image(plain, np.eye(4)), server.studies / "plain.nii.gz")
    server.start()
    yield server
    server.stop()


def nifti(voxels: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    return gzip.compress(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine).to_bytes(), 1)


def bomb() -> bytes:
    """A few kilobytes that say that they are 4 GiB of zeros, and are 64 MiB of them."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((1024, 1024, 1024))
    return gzip.compress(header.binaryblock + b"\0" * (4 + 64 * 2**20), 1)


def zip_bomb() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scan.nii", b"\0" * (64 * 2**20))
    return packed.getvalue()


def zip_slip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../../../../../studies/evil.nii.gz", b"not an image either")
    return packed.getvalue()


def detached(kind: str) -> bytes:
    """A header whose voxels are said to lie in another file of the server."""
    if kind == "nrrd":
        fields = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 8 8 8\nencoding: raw\ndata file: /etc/passwd\n\n"
    else:
        fields = (
            "ObjectType = Image\nNDims = 3\nDimSize = 8 8 8\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n"
        )
    return fields.encode()


def disguised() -> bytes:
    """An NRRD that leads to another file, with a comment that MetaImage would take for its own voxels."""
    return detached("nrrd").replace(b"type:", b"# ElementDataFile = LOCAL\ntype:")


TIFF = b"II*\0\x08\0\0\0" + b"\0" * 1000


def scan(content: bytes, name: str = "scan.nii.gz", part: str = "file") -> dict[str, Any]:
    return {"files": {"params": (None, PARAMS), part: (name, content)}}


NOISE = np.random.default_rng(0).normal(100, 20, (40, 40, 40)).astype(np.float32)
GOOD = nifti(NOISE)
LARGE = b"\0" * (2 * 2**20)

# method, path, what is sent, the statuses that are right
REQUESTS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "infer: absolute path": ("POST", "/infer/hippocampus_mr?image=/etc/passwd", {}, (404,)),
    "infer: the secret's path": ("POST", "/infer/hippocampus_mr?image={secret}", {}, (404,)),
    "infer: dots": ("POST", "/infer/hippocampus_mr?image=../secret", {}, (404,)),
    "infer: encoded dots": ("POST", "/infer/hippocampus_mr?image=..%2fsecret", {}, (404,)),
    "infer: twice encoded dots": ("POST", "/infer/hippocampus_mr?image=%252e%252e%252fsecret", {}, (404,)),
    "infer: backslashes": ("POST", "/infer/hippocampus_mr?image=..%5csecret", {}, (404,)),
    "infer: NUL": ("POST", "/infer/hippocampus_mr?image=case_0%00.nii.gz", {}, (404,)),
    "infer: a folder": ("POST", "/infer/hippocampus_mr?image=.", {}, (404,)),
    "infer: an overlong id": ("POST", "/infer/hippocampus_mr?image=" + "a" * 5000, {}, (404,)),
    "infer: a link out of the studies": ("POST", "/infer/hippocampus_mr?image=linked", {}, (403,)),
    "infer: a hard link out of the studies": ("POST", "/infer/hippocampus_mr?image=hard", {}, (403,)),
    "infer: a FIFO": ("POST", "/infer/hippocampus_mr?image=fifo", {}, (403, 422)),
    "fetch: a FIFO": ("GET", "/datastore/image?image=fifo", {}, (403, 422)),
    "fetch: a label that is a link": ("GET", "/datastore/label?label=plain&tag=final", {}, (403, 404)),
    "infer: a path inside params": (
        "POST", "/infer/hippocampus_mr?image=case_0", {"data": {"params": '{"image": "/etc/passwd"}'}}, (404,),
    ),
    "infer: a list as image": (
        "POST", "/infer/hippocampus_mr?image=case_0", {"data": {"params": '{"image": ["/etc/passwd"]}'}}, (400,),
    ),
    "infer: model name with dots": ("POST", "/infer/..%2f..%2fmain?image=case_0", {}, (404, 405)),
    "infer: session with dots": ("POST", "/infer/hippocampus_mr?session_id=../../studies", {}, (404,)),
    "infer: extension with a path": (
        "POST", "/infer/hippocampus_mr?image=case_0", {"data": {"params": '{"result_extension": "/../x.nii"}'}}, (400,),
    ),
    "infer: NaN as a number": (
        "POST", "/infer/hippocampus_mr?image=case_0", {"data": {"params": '{"result_compress": NaN}'}}, (400,),
    ),
    "infer: a thousand brackets": (
        "POST", "/infer/hippocampus_mr?image=case_0", {"data": {"params": '{"a":' * 5000 + "1" + "}" * 5000}}, (400,),
    ),
    "infer: a lone surrogate": (
        "POST", "/infer/hippocampus_mr?image=case_0", {"data": {"params": '{"device": "\\ud800"}'}}, (400,),
    ),
    "infer: WSI route that reads any path": ("POST", "/infer/wsi_v2/hippocampus_mr?image=/etc/passwd", {}, (404,)),
    "infer: garbage": ("POST", "/infer/hippocampus_mr", scan(b"\x1f\x8bgarbage"), (422,)),
    "infer: gzip bomb": ("POST", "/infer/hippocampus_mr", scan(bomb()), (413,)),
    "infer: NRRD of another file": ("POST", "/infer/hippocampus_mr", scan(detached("nrrd"), "a.nrrd"), (422,)),
    "infer: MetaImage of another file": ("POST", "/infer/hippocampus_mr", scan(detached("mha"), "a.mha"), (415,)),
    "infer: NRRD of another file, disguised": ("POST", "/infer/hippocampus_mr", scan(disguised(), "a.nrrd"), (422,)),
    "infer: TIFF as NRRD": ("POST", "/infer/hippocampus_mr", scan(TIFF, "a.nrrd"), (415,)),
    "upload: NRRD of another file": ("PUT", "/datastore/image?image=evil", scan(disguised(), "a.nrrd"), (422,)),
    "upload: TIFF as NRRD": ("PUT", "/datastore/image?image=evil", scan(TIFF, "a.nrrd"), (415,)),
    "session: NRRD of another file": ("PUT", "/session/", scan(disguised(), "a.nrrd", "files"), (422,)),
    "session: MetaImage of another file": ("PUT", "/session/", scan(detached("mha"), "a.nrrd", "files"), (415,)),
    "session: TIFF as NRRD": ("PUT", "/session/", scan(TIFF, "a.nrrd", "files"), (415,)),
    "infer: a file of the studies that leads to another": ("POST", "/infer/hippocampus_mr?image=detached", {}, (422,)),
    "fetch: slice of a file that leads to another": ("GET", "/case/detached/slice.png?plane=axial&index=0", {}, (422,)),
    "infer: program as image": ("POST", "/infer/hippocampus_mr", scan(b"#!/bin/sh\n", "a.sh"), (422,)),
    "upload: id with dots": ("PUT", "/datastore/image?image=../../evil", scan(GOOD), (400,)),
    "upload: absolute id": ("PUT", "/datastore/image?image=/evil", scan(GOOD), (400,)),
    "upload: hidden id": ("PUT", "/datastore/image?image=.evil", scan(GOOD), (400,)),
    "upload: NUL in the id": ("PUT", "/datastore/?image=evil%00", scan(GOOD), (400,)),
    "upload: over an image": ("PUT", "/datastore/image?image=case_0", scan(GOOD), (409,)),
    "upload: oversize": ("PUT", "/datastore/image?image=evil", scan(LARGE), (413,)),
    "upload: gzip bomb": ("PUT", "/datastore/image?image=evil", scan(bomb()), (413,)),
    "upload: app code": ("PUT", "/datastore/image?image=main", scan(b"import os", "main.py"), (422,)),
    "label: tag with dots": ("PUT", "/datastore/label?image=case_0&tag=../../..", scan(GOOD, part="label"), (400,)),
    "label: image with dots": ("PUT", "/datastore/label?image=../evil", scan(GOOD, part="label"), (404,)),
    "label: tag of a folder's": ("PUT", "/datastore/label?image=case_0&tag=final/..", scan(GOOD, part="label"), (400,)),
    "label: NUL in the image": ("PUT", "/datastore/label?image=case_0%00", scan(GOOD, part="label"), (404,)),
    "label: gzip bomb": ("PUT", "/datastore/label?image=case_0", scan(bomb(), part="label"), (413,)),
    "label: oversize": ("PUT", "/datastore/label?image=case_0", scan(LARGE, part="label"), (413,)),
    "versions: image with dots": ("GET", "/datastore/label/versions?image=../secret", {}, (404,)),
    "versions: tag with dots": ("GET", "/datastore/label/versions?image=case_0&tag=../..", {}, (400,)),
    "versions: dots": ("GET", "/datastore/label/versions/..%2f..%2findex.sqlite", {}, (404,)),
    "restore: dots": ("POST", "/datastore/label/versions/..%2f1/restore", {"json": {}}, (404, 405)),
    "restore: nothing of that id": ("POST", "/datastore/label/versions/1/restore", {"json": {}}, (404,)),
    "quarantine: dots": ("GET", "/datastore/quarantine/..%2findex", {}, (404,)),
    "skip: image with dots": ("PUT", "/leases/skipped?image=../x", {"json": {"reason": "x"}}, (404,)),
    "skip: no reason": ("PUT", "/leases/skipped?image=case_0", {"json": {}}, (400,)),
    "give back: somebody else's": ("DELETE", "/leases/?image=../x", {}, (404,)),
    "next sample: strategy with dots": ("POST", "/activelearning/..%2fx", {"json": {}}, (404,)),
    "fetch: image with dots": ("GET", "/datastore/image?image=../secret", {}, (404,)),
    "fetch: link": ("GET", "/datastore/image?image=linked", {}, (403,)),
    "fetch: label tag with dots": ("GET", "/datastore/label?label=secret&tag=../..", {}, (400,)),
    "remove: image with dots": ("DELETE", "/datastore/image?id=../secret", {}, (404,)),
    "remove: label with dots": ("DELETE", "/datastore/label?id=../../secret&tag=final", {}, (404,)),
    "session: ZIP that climbs out": ("PUT", "/session/?uncompress=true", scan(zip_slip(), "a.zip", "files"), (422,)),
    "session: ZIP bomb": ("PUT", "/session/?uncompress=true", scan(zip_bomb(), "a.zip", "files"), (413,)),
    "session: dots": ("DELETE", "/session/..", {}, (404, 405)),
    "model: name with dots": ("PUT", "/model/..%2f..%2fmain.py", scan(b"import os"), (404, 405)),
    "model: pickle": ("PUT", "/model/hippocampus_mr", scan(b"\x80\x04cposix\nsystem\n(Vid\ntR.", "m.pt"), (422,)),
    "train: run name with dots": ("POST", "/train/hippocampus_mr", {"json": {"name": "../../evil"}}, (400,)),
    "train: infinite rate": ("POST", "/train/hippocampus_mr", {"data": '{"learning_rate": 1e999}'}, (400,)),
    "train: oversize parameters": ("POST", "/train/hippocampus_mr", {"json": {"a": "x" * 2**21}}, (413,)),
    "proxy: dots": ("GET", "/proxy/dicom/wado/..%2fsystem", {}, (400, 404)),
    "static: dots": ("GET", "/static/..%2f..%2fapp.py", {}, (404,)),
    "another page's request": ("POST", "/train/hippocampus_mr", {"headers": {"Origin": "http://evil.example"}}, (403,)),
}  # fmt: skip


def state(server: Server) -> dict[str, str]:
    """Everything that the server could have written, but for its log."""
    files = fingerprint(server.folder, MAIN)
    del files[str(server.log)]
    # SQLite's readers note themselves in its shared memory, which holds nothing that is kept
    return {name: digest for name, digest in files.items() if not name.endswith(".sqlite-shm")}


def authorised(options: dict[str, Any], token: str) -> dict[str, Any]:
    return options | {"headers": {"Authorization": f"Bearer {token}"} | options.get("headers", {})}


@pytest.mark.parametrize("name", REQUESTS)
def test_hostile_request_is_refused_and_changes_nothing(guarded: Server, tokens: dict[str, str], name: str) -> None:
    method, path, options, statuses = REQUESTS[name]
    before = state(guarded)
    path = path.replace("{secret}", str(guarded.folder / SECRET))
    # as an administrator: what is refused is the request, not the client
    answer = guarded.request(method, path, **authorised(options, tokens["admin"]))
    assert answer.status_code in statuses, answer.text
    assert set(answer.json()) == {"detail", "error", "request_id"}
    assert "Traceback" not in answer.text and "root:" not in answer.text
    assert state(guarded) == before
    assert guarded.get("/healthz").status_code == 200


def test_file_that_is_left_out_is_told_and_nothing_else_fails(guarded: Server, tokens: dict[str, str]) -> None:
    admin = authorised({}, tokens["admin"])
    assert guarded.ready().status_code == 200
    for path in ("/", "/datastore/?output=all", "/datastore/?output=stats"):
        assert guarded.get(path, **admin).status_code == 200, path
    warnings = " ".join(guarded.get("/readyz", **admin).json()["warnings"])
    for name in ("fifo.nii.gz", "hard.nii.gz", "linked.nii.gz", "udcfcller.nii.gz", "plain.nii.gz"):
        assert name in warnings
    images = guarded.get("/datastore/?output=all", **admin).json()["objects"]
    assert not {"fifo", "hard", "linked"} & images.keys()


SHAPE = (40, 50, 40)
FITS = np.zeros(SHAPE, np.uint8)
FITS[10:20, 10:20, 10:20] = 1
TWO = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]


def with_value(value: float, dtype: type = np.float32) -> np.ndarray:
    voxels = FITS.astype(dtype)
    voxels[15, 15, 15] = value
    return voxels


def moved() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, 3] = 40
    return affine


# what is submitted as the label of "plain", what comes with it, and what the refusal says
LABELS: dict[str, tuple[bytes, Any, str]] = {
    "garbage": (b"\x1f\x8bgarbage", TWO, "cannot be read"),
    "empty": (b"", TWO, "empty file"),
    "an NRRD of another file": (disguised(), TWO, "cannot be read"),
    "a program": (b"#!/bin/sh\nrm -rf /\n", TWO, "cannot be read"),
    "a pickle": (b"\x80\x04cposix\nsystem\n(Vid\ntR.", TWO, "cannot be read"),
    "cut short": (nifti(np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8))[:9000], TWO, "cannot be read"),
    "2D": (nifti(FITS[:, :, 0]), TWO, "valid: 3D"),
    "4D": (nifti(np.stack([FITS] * 3, axis=-1)), TWO, "valid: 3D"),
    "another shape": (nifti(FITS[:-1]), TWO, "shape (39, 50, 40); valid: its image's (40, 50, 40)"),
    "another place": (nifti(FITS, moved()), TWO, "mm away from its image"),
    "NaN": (nifti(with_value(np.nan)), TWO, "not finite"),
    "infinity": (nifti(with_value(np.inf)), TWO, "not finite"),
    "fractions": (nifti(with_value(1.5)), TWO, "no whole numbers, such as 1.5"),
    "negative": (nifti(with_value(-1, np.int16)), TWO, "the value -1"),
    "10,000 labels": (nifti((np.arange(80_000) % 10_001).reshape(SHAPE).astype(np.int32)), TWO, "different values"),
    "a value without a name": (nifti(with_value(3)), TWO, "the values 3, which nothing names"),
    "values without names": (nifti(with_value(9)), None, "the values 9, and no label_info to explain them"),
    "unknown names": (nifti(FITS), [{"name": "spleen", "idx": 1}], "known: anterior, posterior"),
    "two names of a value": (nifti(FITS), [*TWO, {"name": "posterior", "idx": 1}], "calls the value 1 both"),
    "names of 10,000": (nifti(FITS), [{"name": f"n{n}", "idx": n} for n in range(10_000)], "not a list of up to"),
    "no list of names": (nifti(FITS), {"anterior": 1}, "not a list"),
    "a path as a name": (nifti(FITS), [{"name": "../../etc", "idx": 1}], "known: anterior, posterior"),
    "an object as idx": (nifti(FITS), [{"name": "anterior", "idx": {"a": 1}}], "idx"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_wrong_label_goes_into_quarantine_and_changes_nothing_else(
    guarded: Server, tokens: dict[str, str], kind: str
) -> None:
    content, names, sentence = LABELS[kind]
    before = state(guarded)
    params = {"client_id": "mallory"} | ({"label_info": names} if names is not None else {})
    name = "label.nrrd" if content.startswith(b"NRRD") else "label.nii.gz"
    files = {"params": (None, json.dumps(params)), "label": (name, content)}
    answer = guarded.put("/datastore/label?image=plain", files=files, **authorised({}, tokens["annotator"]))
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"] == "LabelError" and sentence in answer.json()["detail"]
    after = state(guarded)
    new = {name: digest for name, digest in after.items() if before.get(name) != digest}
    assert before.items() <= after.items(), "something was changed"
    assert len(new) == 2 and all("/history/quarantine/" in name for name in new)
    listed = guarded.get("/datastore/quarantine", **authorised({}, tokens["reviewer"])).json()[0]
    assert sentence in listed["reason"] and listed["user"] == "annotator1" and listed["image_id"] == "plain"
    kept = guarded.get(f"/datastore/quarantine/{listed['name']}", **authorised({}, tokens["reviewer"]))
    assert kept.content == content


NEEDS = {
    "user": [
        ("GET", "/info/"), ("GET", "/train/"), ("POST", "/infer/hippocampus_mr"), ("POST", "/activelearning/random"),
        ("GET", "/datastore/"), ("GET", "/datastore/image?image=case_0"), ("GET", "/metrics"), ("PUT", "/session/"),
        ("GET", "/leases/"), ("GET", "/datastore/label/versions?image=case_0"), ("GET", "/datastore/label/versions/x"),
        ("GET", "/datastore/label/versions/x/info"),
    ],
    "annotator": [
        ("PUT", "/datastore/label?image=case_0"), ("PUT", "/datastore/image?image=x"), ("POST", "/batch/infer/nope"),
        ("PUT", "/datastore/image/info?image=nope"), ("GET", "/datastore/dataset"),
        ("PUT", "/leases/skipped?image=nope"), ("DELETE", "/leases/skipped?image=nope"),
        ("DELETE", "/leases/?image=nope"),
    ],
    "reviewer": [
        ("POST", "/train/nope"), ("POST", "/train/"), ("DELETE", "/train/"),
        ("POST", "/datastore/label/versions/nope/restore"), ("GET", "/datastore/quarantine"),
        ("GET", "/datastore/quarantine/nope"),
    ],
    "admin": [
        ("PUT", "/model/nope"), ("GET", "/model/nope"), ("DELETE", "/model/nope"), ("GET", "/logs/?lines=1"),
        ("GET", "/logs/gpu"), ("DELETE", "/datastore/image?id=nope"), ("DELETE", "/datastore/label?id=nope&tag=final"),
        ("POST", "/reload"),
    ],
}  # fmt: skip
CALLS = [(role, method, path) for role, calls in NEEDS.items() for method, path in calls]


@pytest.mark.parametrize(("role", "method", "path"), CALLS)
def test_call_needs_its_role(guarded: Server, tokens: dict[str, str], role: str, method: str, path: str) -> None:
    order = ["user", *ROLES]
    assert guarded.request(method, path).status_code == 401
    assert guarded.request(method, path, **authorised({}, "wrong")).status_code == 401
    for holder in ROLES:
        if path in ("/train/", "/reload") and method == "POST":
            continue  # would start a training; /reload is refused to everybody
        status = guarded.request(method, path, **authorised({}, tokens[holder])).status_code
        assert (status == 403) == (order.index(holder) < order.index(role)), (holder, status)
        assert status != 401


def test_predictions_become_final_labels_for_reviewers_alone(guarded: Server, tokens: dict[str, str]) -> None:
    body = {"images": ["case_0"], "label_tag": "final"}
    asked = {"params": (None, json.dumps({"save_label": True, "label_tag": "final"}))}
    annotator = authorised({}, tokens["annotator"])
    for refused in (
        guarded.post("/batch/infer/hippocampus_mr", json=body, **annotator),
        guarded.post("/infer/hippocampus_mr?image=case_0", files=asked, **annotator),
    ):
        assert refused.status_code == 403 and "valid: the role reviewer" in refused.json()["detail"]
    assert guarded.request("HEAD", "/datastore/label?image=case_0&tag=final", **annotator).status_code == 404


def test_token_is_never_logged(guarded: Server, tokens: dict[str, str]) -> None:
    guarded.post("/train/nope", **authorised({}, tokens["annotator"]))
    guarded.get("/info/", **authorised({}, "a-wrong-token-1234"))
    log = guarded.log.read_text(errors="replace")
    assert "'annotator1' is annotator" in log
    assert not any(secret in log for secret in (*(tokens[role] for role in ROLES), "a-wrong-token-1234"))


def test_slicer_gets_a_token_for_user_and_token(guarded: Server, tokens: dict[str, str]) -> None:
    assert guarded.get("/auth/").json()["enabled"] is True
    form = {"username": "annotator1", "password": tokens["annotator"], "grant_type": "password"}
    given = guarded.post("/auth/token", data=form).json()
    header = {"Authorization": f"{given['token_type']} {given['access_token']}"}
    assert guarded.get("/auth/token/valid", headers=header).json() == {"username": "annotator1", "roles": ["annotator"]}
    assert guarded.post("/auth/token", data=form | {"username": "admin1"}).status_code == 401


def test_endless_upload_is_cut_off(guarded: Server, tokens: dict[str, str]) -> None:
    """Without a length, the limit is found out as the body comes in."""

    def blocks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.nii.gz"\r\n\r\n'
        for _ in range(64):
            yield b"\0" * 2**16
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b", "Authorization": f"Bearer {tokens['admin']}"}
    answer = guarded.put("/datastore/image?image=evil", data=blocks(), headers=headers)
    assert answer.status_code == 413, answer.text


def test_form_of_many_text_fields_is_refused(guarded: Server, tokens: dict[str, str]) -> None:
    """Each may hold a mebibyte, and all of them are kept in memory."""
    header = {"Authorization": f"Bearer {tokens['admin']}"}
    for count, refusal in ((20, "no image"), (21, "Too many fields")):
        fields = [(f"field{number}", (None, "a")) for number in range(count)]
        files = [*fields, ("label", ("label.nii.gz", b"nothing"))]
        answer = guarded.put("/datastore/label?image=nobody", files=files, headers=header)
        assert 400 <= answer.status_code < 500 and refusal in answer.text, answer.text


def test_broken_http_gets_a_400(guarded: Server) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=20) as connection:
        connection.sendall(b"GET /\x00\x01 HTTP/9.9\r\nnonsense\r\n\r\n")
        assert connection.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert guarded.get("/healthz").status_code == 200


def test_page_of_this_server_may_call_it(guarded: Server, tokens: dict[str, str]) -> None:
    headers = {"Origin": guarded.url, "Authorization": f"Bearer {tokens['reviewer']}"}
    assert guarded.delete("/train/", headers=headers).status_code == 200


def test_other_pages_get_no_permission_to_read(guarded: Server, tokens: dict[str, str]) -> None:
    headers = {"Origin": "http://evil.example", "Authorization": f"Bearer {tokens['admin']}"}
    assert "access-control-allow-origin" not in guarded.get("/info/", headers=headers).headers
    assert "access-control-allow-origin" not in guarded.get("/", headers=headers).headers
    asked = headers | {"Access-Control-Request-Method": "PUT"}
    assert guarded.request("OPTIONS", "/datastore/label", headers=asked).status_code >= 400


NOT_OURS = ("linked", "hard", "fifo", "ller", "detached")


def test_next_sample_and_dataset_hold_no_foreign_file(
    guarded: Server, tokens: dict[str, str], cases: dict[str, SyntheticCase]
) -> None:
    annotator = authorised({}, tokens["annotator"])
    given = set()
    for strategy in ("random", "typical"):
        for number in range(len(cases) + 3):
            client = {"client_id": f"{strategy}{number}"}
            answer = guarded.post(f"/activelearning/{strategy}", json=client, **annotator)
            assert answer.status_code == 200, answer.text
            given.add(answer.json().get("id"))
    assert given <= {*cases, "plain", None} and len(given) > 2
    label = nifti(cases["case_0"].label.astype(np.uint8), cases["case_0"].affine_ras)
    for name in (b"linked", b"hard", b"M\xfcller"):
        (guarded.studies / "labels" / "final" / os.fsdecode(name + b".nii.gz")).write_bytes(label)
    files = {"params": (None, json.dumps({"label_info": TWO})), "label": ("label.nii.gz", label)}
    assert guarded.put("/datastore/label?image=case_0", files=files, **annotator).status_code == 200
    answer = guarded.get("/datastore/dataset", **annotator)
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        names = archive.namelist()
    assert any("case_0" in name for name in names)
    assert not any(part in name for name in names for part in NOT_OURS)
    problems = guarded.get("/datastore/problems", **annotator).json()["files"]
    told = " ".join(file["name"] for file in problems)
    assert all(part in told for part in ("linked", "hard", "fifo", "ller")), told


def test_batch_over_a_pool_with_foreign_files_ends_without_a_trace(guarded: Server, tokens: dict[str, str]) -> None:
    annotator = authorised({}, tokens["annotator"])
    start = len(guarded.log.read_bytes())
    images = ["case_1", "detached"]
    answer = guarded.post("/batch/infer/hippocampus_mr?run_sync=true", json={"images": images}, **annotator)
    assert answer.status_code == 200, answer.text
    assert "error" in answer.json()["detached"] and "error" not in answer.json()["case_1"]
    said = guarded.log.read_bytes()[start:].decode(errors="replace")
    assert "'detached' was left out: " in said and "Traceback" not in said
