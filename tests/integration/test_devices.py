"""Two lanes of one CPU, in a real server: both are used, and the masks are those that one after the other gives."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from synthetic_hippocampus import SyntheticCase

from tests.integration.conftest import prepare
from tests.integration.server import Server, parse_multipart

MODEL = "hippocampus_mr"


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server with two lanes, which keeps no masks: each request is computed."""
    folder = tmp_path_factory.mktemp("lanes")
    conf = {"models": MODEL, "devices": "cpu,cpu", "result_cache_mib": "0"}
    server = prepare(Server(folder, conf), cases).start()
    yield server
    assert server.stop() in (0, -15)
    shutil.rmtree(folder)


def _figure(server: Server, name: str) -> dict[str, float]:
    """A figure of each device."""
    text = server.get("/metrics").text
    return {lane: float(value) for lane, value in re.findall(rf'^{name}{{device="([^"]+)"}} (\S+)$', text, re.M)}


def _segment(server: Server, image: str) -> bytes:
    answer = server.infer(MODEL, image, result_extension=".nii")  # NRRD has the time in it
    assert answer.status_code == 200, answer.text
    return parse_multipart(answer)["image"][1]


def test_requests_at_once_give_the_masks_of_one_after_the_other_on_both_lanes(
    lanes: Server, cases: dict[str, SyntheticCase]
) -> None:
    # at once first: while nobody has the weights, waiting for a lane is never sooner than loading them on the other
    with ThreadPoolExecutor(len(cases)) as clients:
        at_once = dict(zip(cases, clients.map(lambda image: _segment(lanes, image), cases), strict=True))
    done = _figure(lanes, "unetr_device_inferences_total")
    assert set(done) == {"cpu", "cpu#2"}
    assert sum(done.values()) == len(cases) and min(done.values()) >= 1
    assert {image: _segment(lanes, image) for image in cases} == at_once
    assert sum(_figure(lanes, "unetr_device_inferences_total").values()) == 2 * len(cases)
    assert _figure(lanes, "unetr_device_works") == {"cpu": 1, "cpu#2": 1}
    assert _figure(lanes, "unetr_device_busy") == {"cpu": 0, "cpu#2": 0}
    assert _figure(lanes, "unetr_device_failures_total") == {"cpu": 0, "cpu#2": 0}


def test_page_names_both_lanes_and_clients_are_offered_all_first(lanes: Server) -> None:
    page = lanes.get("/").text
    assert "Device cpu</dt>" in page and "Device cpu#2</dt>" in page
    assert lanes.get("/info/").json()["models"][MODEL]["config"]["device"] == ["all", "cpu"]
    answer = lanes.infer(MODEL, "case_0", device="all")
    assert answer.status_code == 200, "a client sends the first choice back"


def test_batch_inference_computes_on_all_lanes(lanes: Server, cases: dict[str, SyntheticCase]) -> None:
    lanes.post(f"/batch/infer/{MODEL}", json={"device": "all"}).raise_for_status()
    status = lanes.wait_for("/batch/infer")
    assert status["status"] == "DONE", status
    labelled = lanes.get("/datastore/?output=all").json()["objects"]
    assert all("original" in labelled[image]["labels"] for image in cases)
