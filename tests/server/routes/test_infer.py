"""Requests for a mask, with a task handed in: no server is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monailabel.interfaces.tasks.infer_v2 import InferType

from lib.infers.devices.lanes import Lanes
from lib.infers.devices.schedule import Forecast
from lib.infers.request import InferRequest
from lib.infers.writer import write_mask
from lib.server.dependencies import (
    get_answers,
    get_find_sessions,
    get_images,
    get_infer_tasks,
    get_inferences,
    get_presented,
    get_store,
)
from lib.server.http.metrics import Metrics
from lib.server.inference.answers import Answers
from lib.server.routes.infer import router
from lib.server.tasks import infer_tasks
from lib.server.work.queue import InferenceQueue
from tests.server.in_process import InProcess
from tests.tiny import boxes, tiny_preset, write_nifti


class Task:
    """Answers with the label's boxes, and counts."""

    preset = tiny_preset()
    type = InferType.SEGMENTATION
    takes_prompts = False

    def __init__(self) -> None:
        self.parsed: list[Mapping[str, Any]] = []
        self.segmented: list[InferRequest] = []

    def parse(self, request: Mapping[str, Any]) -> InferRequest:
        self.parsed.append(request)
        return InferRequest.parse(request, torch.device("cpu"))

    def forecast(self, request: InferRequest) -> Forecast:
        return Forecast()

    def segment(self, request: InferRequest) -> tuple[str, dict[str, Any]]:
        assert request.image.is_file()
        self.segmented.append(request)
        labels = boxes()[1]
        said = {"cache": {"hit": False}, "latencies_ms": {"total": 1.0}, "warnings": ["it is made up"]}
        file = write_mask(labels, torch.eye(4).numpy(), self.preset, request.extension, request.dtype, request.compress)
        return str(file), said


@pytest.fixture
def task() -> Task:
    return Task()


@pytest.fixture
def api(task: Task) -> InProcess:
    segmentations: Any = SimpleNamespace(submissions=SimpleNamespace(presets={}), presented=None)
    services = {
        get_infer_tasks: infer_tasks({"tiny": task}),
        get_images: None,
        get_store: None,
        get_presented: None,
        get_find_sessions: None,
        get_inferences: InferenceQueue(4, Lanes.of("cpu")),
        get_answers: Answers(None, None, segmentations, Metrics(), 64),  # type: ignore[arg-type]
    }
    return InProcess(router, services)


def upload(folder: Path, **params: Any) -> dict[str, Any]:
    image = write_nifti(folder / "scan.nii.gz", boxes()[0])
    return {"params": (None, json.dumps(params)), "file": ("C:\\scan.nii.gz", image.read_bytes(), "application/gzip")}


def test_request_is_parsed_once_and_its_upload_is_gone_afterwards(api: InProcess, task: Task, tmp_path: Path) -> None:
    answer = api.request("POST", "/infer/tiny", files=upload(tmp_path, device="cpu", result_extension=".nrrd"))
    assert answer.status_code == 200, answer.text
    (asked,) = task.segmented
    assert len(task.parsed) == 1
    assert (asked.requested_device, asked.extension, asked.image.name) == (torch.device("cpu"), ".nrrd", "scan.nii.gz")
    assert not asked.image.exists()


def test_answer_has_the_json_first_and_then_the_mask_under_its_name(api: InProcess, tmp_path: Path) -> None:
    answer = api.request("POST", "/infer/tiny", files=upload(tmp_path))
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/form-data"
    _, params, mask, end = answer.content.split(b"--" + boundary.encode())
    assert end == b"--\r\n"
    head, _, content = params.partition(b"\r\n\r\n")
    assert head == b'\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json'
    assert json.loads(content)["warnings"] == ["it is made up"]
    assert answer.headers["x-warnings"] == "it%20is%20made%20up"
    head, _, content = mask.partition(b"\r\n\r\n")
    assert head.startswith(b'\r\nContent-Disposition: form-data; name="image"; filename="mask-')
    assert content.startswith(b"\x1f\x8b"), "gzip, as the upload's kind is"


@pytest.mark.parametrize(
    ("path", "params", "status", "named"),
    [
        ("/infer/nobody", {}, 404, "known: tiny"),
        ("/infer/tiny", {"result_dtype": "complex64"}, 400, "complex64"),
        ("/infer/tiny", {"device": "cuda:99"}, 400, "cuda:99"),
        ("/infer/tiny?output=dicom_seg", {}, 400, "dicom_seg"),
    ],
)
def test_bad_request_is_refused_before_it_waits(
    api: InProcess, task: Task, tmp_path: Path, path: str, params: dict[str, Any], status: int, named: str
) -> None:
    answer = api.request("POST", path, files=upload(tmp_path, **params))
    assert answer.status_code == status and named in answer.json()["detail"]
    assert task.segmented == []
