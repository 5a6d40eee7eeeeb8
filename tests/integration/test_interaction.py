"""Clicks and scribbles over REST, as 3D Slicer and OHIF send them, against the real server."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_hippocampus import SyntheticCase

from lib.configs.catalogue import load_preset
from lib.interaction.annotator import Correction
from tests.integration.conftest import encode
from tests.integration.hostile_prompts import NOT_BOXES, check_prompts
from tests.integration.server import Server, parse_multipart, read_nrrd


def click(server: Server, folder: Path, case: str, **params: Any) -> tuple[np.ndarray, dict[str, Any]]:
    sent = {"result_extension": ".nrrd", "client_id": "clicker", **params}
    answer = server.post("/infer/hippocampus_mr_edit", params={"image": case}, data={"params": json.dumps(sent)})
    assert answer.status_code == 200, answer.text
    parts = parse_multipart(answer)
    return read_nrrd(parts["image"][1], folder)[0], json.loads(parts["params"][1])


def test_clicks_are_obeyed_and_the_other_label_keeps_its_voxels(
    server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    automatic = parse_multipart(server.infer("hippocampus_mr", "case_1"))
    before = read_nrrd(automatic["image"][1], tmp_path)[0]
    point = [2, 3, 4]
    mask, answer = click(server, tmp_path, "case_1", anterior=[point], posterior=[], background=[], label="anterior")
    assert answer["label_names"] == {"anterior": 1} and set(np.unique(mask)) == {0, 1} and mask[2, 3, 4] == 1
    whole, _ = click(server, tmp_path, "case_1", anterior=[point], all_labels=True)
    assert set(np.unique(whole[whole != before])) <= {1}
    inside = [int(v) for v in np.argwhere(before == 2)[200]]
    mask, answer = click(server, tmp_path, "case_1", background=[inside], label="background")
    assert answer["label_names"] == {"posterior": 2} and mask[tuple(inside)] == 0
    again, answer = click(server, tmp_path, "case_1", background=[inside])
    assert answer["cache"]["hit"]
    np.testing.assert_array_equal(again, mask)


def test_bad_prompts_are_refused_and_change_no_other_label(
    server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    labels = {"anterior": 1, "posterior": 2}
    check_prompts(server, "hippocampus_mr_edit", {"image": "case_1"}, labels, tmp_path)
    file = encode(cases["case_1"].image, cases["case_1"].affine_ras, tmp_path)
    session = server.put("/session/", files={"files": ("scan.nii.gz", file)}).json()["session_id"]
    check_prompts(server, "hippocampus_mr_edit", {"session_id": session}, labels, tmp_path)
    for image in (["case_1"], {"a": 1}, "case_1\0", "../case_1"):
        data = {"params": json.dumps({"anterior": [[1, 1, 1]], "image": image})}
        assert 400 <= server.post("/infer/hippocampus_mr_edit?image=case_1", data=data).status_code < 500


def test_points_without_a_label_of_ohif_and_of_other_tasks_are_left_out(server: Server, tmp_path: Path) -> None:
    _, answer = click(server, tmp_path, "case_1", **{"null": [[1, 1, 1]], "core": [[1, 1, 1]], "background": []})
    assert answer["interaction"]["prompts"] == 0


def test_correction_starts_from_what_the_same_client_saved(
    server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_2"]
    drawn = np.zeros(case.image.shape, np.uint8)
    drawn[5:9, 5:9, 5:9] = 2
    info = {"label_info": [{"name": "posterior", "idx": 2}], "client_id": "clicker"}
    file = ("label.nii.gz", encode(drawn, case.affine_ras, tmp_path))
    saved = server.put(
        "/datastore/label", params={"image": "case_2"}, data={"params": json.dumps(info)}, files={"label": file}
    )
    assert saved.status_code == 200, saved.text
    whole, answer = click(server, tmp_path, "case_2", anterior=[[15, 20, 15]], all_labels=True)
    assert answer["interaction"]["start"] not in ("automatic", "empty")
    assert (whole[5:9, 5:9, 5:9] == 2).all() and whole[15, 20, 15] == 1
    _, answer = click(server, tmp_path, "case_2", anterior=[[15, 20, 15]], client_id="somebody else")
    assert answer["interaction"]["start"] == "automatic"


def test_scribbles_of_slicer_change_the_chosen_label(
    server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_3"]
    drawing = np.zeros(case.image.shape, np.uint8)
    drawing[5:9, 5:9, 5:9], drawing[12:15, 20, 15], drawing[2, 2:9, 2] = 1, 4, 3
    names = ("anterior", "posterior", "background_scribbles", "foreground_scribbles")
    params = {
        "label_info": [{"name": name, "id": number} for number, name in enumerate(names, 1)],
        "roi": [],
        "selected_label_name": "anterior",
        "result_extension": ".nrrd",
    }
    answer = server.post(
        "/infer/hippocampus_mr_scribbles",
        params={"image": "case_3"},
        data={"params": json.dumps(params)},
        files={"label": ("scribbles.nii.gz", encode(drawing, case.affine_ras, tmp_path))},
    )
    assert answer.status_code == 200, answer.text
    mask = read_nrrd(parse_multipart(answer)["image"][1], tmp_path)[0]
    assert set(np.unique(mask)) == {0, 1}
    assert (mask[drawing == 4] == 1).all() and (mask[drawing == 3] == 0).all() and (mask[drawing == 1] == 1).all()
    hostile: list[dict[str, Any]] = [
        {"label_info": wrong}
        for wrong in (None, 5, "x", [1], [{}], [{"name": 5, "id": 1}], [{"name": "anterior", "id": "1"}],
                      [{"name": "anterior", "id": 0}], [{"name": "anterior", "id": -1}], [{"id": 1}],
                      [{"name": "anterior", "id": 1}, {"name": "posterior", "id": 1}])
    ]  # fmt: skip
    hostile += [{"selected_label_name": wrong} for wrong in (None, 5, ["anterior"], "", "x" * 5000, "\n", names[2])]
    hostile += [{"roi": wrong} for wrong in NOT_BOXES]
    for changed in hostile:
        refused = server.post(
            "/infer/hippocampus_mr_scribbles",
            params={"image": "case_3"},
            data={"params": json.dumps(params | changed)},
            files={"label": ("scribbles.nii.gz", encode(drawing, case.affine_ras, tmp_path))},
        )
        assert 400 <= refused.status_code < 500, (changed, refused.text)
    for wrong in ({"files": None}, {"data": {"params": json.dumps(params | {"selected_label_name": "no"})}}):
        request: dict[str, Any] = {"data": {"params": json.dumps(params)}, "files": None} | wrong
        refused = server.post("/infer/hippocampus_mr_scribbles", params={"image": "case_3"}, **request)
        assert 400 <= refused.status_code < 500, refused.text


def test_click_without_weights_draws_from_nothing(server: Server, tmp_path: Path) -> None:
    data = {"params": json.dumps({"core": [[15, 20, 15]], "result_extension": ".nrrd"})}
    answer = server.post("/infer/tiny_edit", params={"image": "case_4"}, data=data)
    assert answer.status_code == 200, answer.text
    mask = read_nrrd(parse_multipart(answer)["image"][1], tmp_path)[0]
    assert mask[15, 20, 15] == 2 and 1 < (mask == 2).sum() < mask.size / 4


def test_case_page_takes_clicks_shows_them_and_saves(server: Server, cases: dict[str, SyntheticCase]) -> None:
    page = server.get("/case/case_0").text
    assert 'id="clicks"' in page and 'value="posterior"' in page
    clicks = [{"plane": "axial", "index": 10, "across": 0.3, "down": 0.4, "label": "posterior", "kind": "add"}]
    clicks += [{"plane": "sagittal", "index": 3, "across": 0.1, "down": 0.1, "label": "posterior", "kind": "remove"}]
    answer = server.post("/case/case_0/clicks", json={"clicks": clicks})
    assert answer.status_code == 200, answer.text
    layer = answer.json()["layer"]
    picture = {"plane": "axial", "index": 10}
    corrected = server.get("/case/case_0/slice.png", params=picture | {"layers": layer})
    assert corrected.status_code == 200
    assert corrected.content != server.get("/case/case_0/slice.png", params=picture).content
    saved = server.post("/case/case_0/clicks/save", json={"clicks": clicks})
    assert saved.status_code == 200, saved.text
    assert saved.json()["preset"] == "hippocampus_mr" and saved.json()["source"] == "page"
    assert saved.json()["prompts_used"] == len(clicks)
    versions = server.get("/datastore/label/versions", params={"image": "case_0"}).json()
    assert versions[0]["version_id"] == saved.json()["version_id"]
    start = {"start": versions[0]["version_id"]}
    assert server.post("/case/case_0/clicks", json={"clicks": clicks[:1], **start}).status_code == 200
    for wrong in ({"clicks": []}, {"clicks": [clicks[0] | {"label": "spleen"}]}, {"clicks": clicks, "start": "none"}):
        assert 400 <= server.post("/case/case_0/clicks", json=wrong).status_code < 500
    assert server.get("/case/case_0/slice.png", params=picture | {"layers": "edit:none"}).status_code == 404


# MONAI Label's client imports it, and leaves connections to the garbage collector.
@pytest.mark.filterwarnings("ignore:'cgi' is deprecated:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning")
def test_benchmark_clicks_as_slicer_does_and_shows_what_comes_back(server: Server, tmp_path: Path) -> None:
    from benchmarks.slicer_clicks import Slicer

    slicer = Slicer(server.url, load_preset("hippocampus_mr"), tmp_path)
    shown = slicer.segment("case_3")
    other = tuple(int(v) for v in np.argwhere(shown == 2)[100])
    point = (other[0], other[1], other[2])
    once = slicer.click("case_3", shown, [Correction(1, point)], None)
    assert once[point] == 1 and set(np.unique(once[once != shown])) == {1}
    inside = tuple(int(v) for v in np.argwhere(once == 1)[0])
    twice = slicer.click("case_3", once, [Correction(1, point), Correction(0, (inside[0], inside[1], inside[2]))], None)
    assert twice[point] == 1 and twice[inside] == 0
    assert slicer.starts == {"automatic"}
    gc.collect()
