"""Bad input: each gets its status and a sentence, the server goes on, and nothing is written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests

from lib.networks.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from tests.integration.server import MAIN, REPOSITORY, Server, fingerprint

NOISE = np.random.default_rng(0).normal(100, 20, (40, 50, 40)).astype(np.float32)


def nifti(voxels: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    image = nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    return gzip.compress(image.to_bytes(), 1)


def damaged() -> bytes:
    whole = nifti(NOISE)
    return whole[: len(whole) // 2]


def with_nan() -> np.ndarray:
    voxels = NOISE.copy()
    voxels[3, 4, 5] = np.nan
    return voxels


IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty file"),
    "text": (lambda: b"this is no image", "damaged or not NIfTI"),
    "cut short": (damaged, "damaged or not NIfTI"),
    "2D": (lambda: nifti(NOISE[:, :, 0]), "valid: 3D"),
    "4D": (lambda: nifti(np.stack([NOISE[:20]] * 3, axis=-1)), "valid: 3D"),
    "tiny": (lambda: nifti(NOISE[:3, :3, :3]), "too small"),
    "huge spacing": (lambda: nifti(NOISE, np.diag([400.0, 400, 400, 1])), "spacing"),
    "not finite": (lambda: nifti(with_nan()), "not finite"),
    "constant": (lambda: nifti(np.ones_like(NOISE)), "constant"),
}


def check_refused(server: Server, answer: requests.Response, status: int, sentence: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"detail", "error", "request_id"}
    assert sentence in body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert server.get("/info/").status_code == 200


@pytest.fixture(autouse=True)
def _nothing_is_written(server: Server):
    folders = (server.studies, server.models, server.temporary, server.folder / "sessions", MAIN)
    before = fingerprint(*folders)
    yield
    assert fingerprint(*folders) == before


@pytest.mark.parametrize("kind", IMAGES)
def test_bad_image_to_segment(server: Server, kind: str) -> None:
    make, sentence = IMAGES[kind]
    answer = server.post("/infer/hippocampus_mr", files={"file": ("scan.nii.gz", make())})
    check_refused(server, answer, 422, sentence)
    assert answer.json()["error"] == "ImageError"


@pytest.mark.parametrize("kind", ["empty", "text", "cut short", "2D", "4D"])
@pytest.mark.parametrize("address", ["/datastore/?image=bad", "/session/"])
def test_bad_image_to_keep(server: Server, address: str, kind: str) -> None:
    make, sentence = IMAGES[kind]
    part = "files" if address.startswith("/session") else "file"
    answer = server.put(address, files={part: ("scan.nii.gz", make())})
    check_refused(server, answer, 422, sentence)


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/infer/nope?image=case_0", 404, "there is no model 'nope'; known: hippocampus_mr, hippocampus_mr_edit, "),
        ("/infer/tiny?image=case_0", 409, "no trained weights yet"),
        ("/infer/hippocampus_mr?image=nope", 404, "there is no image 'nope'"),
        ("/infer/hippocampus_mr", 400, "'image'"),
        ("/infer/hippocampus_mr?session_id=nope", 404, "there is no session 'nope'"),
        ("/infer/hippocampus_mr?image=case_0&output=nope", 400, "'output' is 'nope'"),
        ("/activelearning/nope", 404, "known: bald, class_balanced_entropy, core_set"),
        ("/train/nope", 404, "known: hippocampus_mr, tiny"),
        ("/batch/infer/nope", 404, "known: hippocampus_mr, tiny"),
        ("/batch/infer/hippocampus_mr?images=nope", 400, "'images'"),
        ("/scoring/nope", 404, "known: all, bald"),
        ("/nope", 404, "there is no '/nope' here"),
        ("/reload", 403, "not reloaded"),
    ],
)
def test_bad_address(server: Server, path: str, status: int, sentence: str) -> None:
    check_refused(server, server.post(path), status, sentence)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ("{", "a JSON object"),
        ("[1, 2]", "a JSON object"),
        ('{"result_extension": ".exe"}', "valid: .nrrd"),
        ('{"result_dtype": "complex"}', "valid: uint8"),
        ('{"result_compress": "maybe"}', "true, false"),
        ('{"device": "tpu"}', "valid: cpu"),
        ('{"device": NaN}', "NaN is no JSON"),
        ('{"largest_component": 7}', "'largest_component' is 7"),
        ('{"save_label": "maybe"}', "'save_label' is 'maybe'"),
    ],
)
def test_bad_inference_parameter(server: Server, params: str, sentence: str) -> None:
    check_refused(server, server.post("/infer/hippocampus_mr?image=case_0", data={"params": params}), 400, sentence)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"max_epochs": 0}, "'max_epochs' is 0"),
        ({"max_epochs": "many"}, "'max_epochs' is 'many'"),
        ({"val_split": 1.5}, "'val_split' is 1.5"),
        ({"name": "../../evil"}, "'name'"),
        ({"gpus": "0; rm -rf /"}, "'gpus'"),
        ({"dataset": "Nope"}, "'dataset' is 'Nope'"),
        ([1], "a JSON object"),
    ],
)
def test_bad_training_parameter(server: Server, body: object, sentence: str) -> None:
    check_refused(server, server.post("/train/hippocampus_mr", data=json.dumps(body)), 400, sentence)


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/datastore/image?image=nope", 404, "there is no image 'nope'"),
        ("GET", "/datastore/image/info?image=nope", 404, "there is no image 'nope'"),
        ("GET", "/datastore/image", 400, "'image' is missing"),
        ("GET", "/datastore/label?label=nope&tag=final", 404, "there is no label 'final' of image 'nope'"),
        ("GET", "/datastore/label?label=case_4&tag=nope", 404, "there is no label 'nope' of image 'case_4'"),
        ("GET", "/datastore/label?label=case_4&tag=..", 400, "'tag' is '..'"),
        ("DELETE", "/datastore/image?id=nope", 404, "there is no image 'nope'"),
        ("DELETE", "/datastore/label?id=nope&tag=final", 404, "there is no label"),
        ("PUT", "/datastore/label?image=case_0", 400, "'label' is missing"),
        ("PUT", "/datastore/image?image=x", 400, "'file' is missing"),
        ("GET", "/session/nope", 404, "there is no session 'nope'"),
        ("DELETE", "/session/nope", 404, "there is no session 'nope'"),
        ("GET", "/model/nope", 404, "there is no model 'nope'"),
        ("GET", "/model/tiny", 404, "there is no weights of 'tiny'"),
        ("GET", "/logs/gpu", 404, "nvidia-smi"),
        ("GET", "/proxy/dicom/qido/patients", 400, "a DICOMweb path"),
        ("GET", "/proxy/dicom/nope/studies", 400, "'service' is 'nope'"),
        ("GET", "/infer/hippocampus_mr", 405, "valid: POST"),
        ("DELETE", "/info/", 405, "valid: GET"),
    ],
)
def test_bad_request(server: Server, method: str, path: str, status: int, sentence: str) -> None:
    check_refused(server, server.request(method, path), status, sentence)


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        ('{"strategy": 5}', "'info' is 'strategy'; valid: other names than path, name, ts, strategy"),
        ('{"a": "' + "x" * 70_000 + '"}', "at most 65536 characters"),
        ("5", "a JSON object"),
    ],
)
def test_bad_image_info(server: Server, info: str, sentence: str) -> None:
    check_refused(server, server.put("/datastore/image/info?image=case_0", data={"info": info}), 400, sentence)


def test_label_of_unknown_image(server: Server) -> None:
    check_refused(server, server.save_label("nope", nifti(NOISE), ["anterior"]), 404, "there is no image 'nope'")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04cposix\nsystem\n."], ids=["empty", "garbage", "pickle"])
def test_bad_weights(server: Server, content: bytes) -> None:
    answer = server.put("/model/hippocampus_mr", files={"file": ("mine.pt", content)})
    check_refused(server, answer, 422, "checkpoint 'mine.pt'")


def test_weights_of_another_network(server: Server, tmp_path: Path) -> None:
    import torch

    torch.save({"layer.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    answer = server.put("/model/hippocampus_mr", files={"file": ("other.pt", (tmp_path / "other.pt").read_bytes())})
    check_refused(server, answer, 422, "the weights do not fit the network")


@pytest.mark.parametrize("kind", ["nan", "empty"])
def test_weights_that_segment_nothing_are_refused_as_a_model(server: Server, tmp_path: Path, kind: str) -> None:
    """NaN becomes an empty mask; so does a network whose background is always the likeliest."""
    shipped = read_checkpoint(REPOSITORY / "model" / "hippocampus_mr" / "shipped.pt")
    state = {name: value.clone() for name, value in shipped.model.items()}
    bias = next(name for name in reversed(state) if name.endswith("bias"))
    state[bias][0] = float("nan") if kind == "nan" else 1e4
    write_checkpoint(tmp_path / "mine.pt", Checkpoint(state, shipped.preset))
    answer = server.put("/model/hippocampus_mr", files={"file": ("mine.pt", (tmp_path / "mine.pt").read_bytes())})
    assert answer.status_code == 422, answer.text
    words = {"nan": "the weights hold values that are not finite (NaN or infinity): ", "empty": "segment nothing there"}
    assert words[kind] in answer.json()["detail"]
    assert server.get("/model/versions/hippocampus_mr").json()["serving"] != "mine"
