"""Cases of two sequences over REST: listed, segmented, corrected, trained on, and judged by the gate."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from dicom_series import SeriesIdentity, write_series
from pydicom import dcmread

from lib.cluster.cli import main as segment
from lib.dicom.presented.instances import uid_of
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from tests.integration.conftest import encode
from tests.integration.hostile_prompts import check_prompts
from tests.integration.server import Server, parse_multipart, read_nrrd, wait_until
from tests.tiny import preset_data, tiny_preset, write_nifti

SHAPE = (28, 28, 28)
COARSE = np.diag([2.0, 2.0, 2.0, 1.0])
CHANNELS = [{"name": "t1"}, {"name": "flair", "display": True}, {"name": "t2", "optional": True}]
LABELLED = [f"s{number}" for number in range(5)]


def _case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1, FLAIR and the label: a box that T1 shows alone, and one that FLAIR shows alone."""
    random = np.random.default_rng(seed)
    label = np.zeros(SHAPE, dtype=np.uint8)
    for value, lowest in ((1, 0), (2, 14)):
        x, y = random.integers(0, 18, 2)
        label[x : x + 10, y : y + 10, lowest + 2 : lowest + 12] = value
    t1, flair = (600.0 * (label == value) + random.normal(0, 30, SHAPE) for value in (1, 2))
    return t1.astype(np.float32), flair.astype(np.float32), label


def _write_studies(folder: Path) -> None:
    t1, flair, _ = _case(100)
    for name, voxels, affine in (("AX T1", t1[::2, ::2, ::2], COARSE), ("SAG FLAIR", flair, np.eye(4))):
        shifted = np.clip(voxels + 200, 0, None).round().astype(np.int32)
        write_series(folder / "dicom" / name[-2:], shifted, affine, SeriesIdentity("SYNTH-9", "MR", name))
    write_nifti(folder / "suffixed_0000.nii.gz", t1[::2, ::2, ::2], COARSE)
    write_nifti(folder / "suffixed_0001.nii.gz", flair)
    write_nifti(folder / "stacked.nii.gz", np.stack([t1, flair, flair], axis=-1))
    write_nifti(folder / "no_t1_0001.nii.gz", flair)
    write_nifti(folder / "no_flair_0000.nii.gz", t1)
    write_nifti(folder / "single.nii.gz", flair)
    for number, name in enumerate(LABELLED):
        t1, flair, _ = _case(number)
        write_nifti(folder / name / f"{name}_t1.nii.gz", t1)
        write_nifti(folder / name / f"{name}_flair.nii.gz", flair)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a preset of two sequences, and one optional, beside a preset of one image; random weights."""
    folder = tmp_path_factory.mktemp("two")
    changes = {"name": "two", "channels": CHANNELS}
    (folder / "two.yaml").write_text(yaml.safe_dump(preset_data(**changes)))
    conf = {"models": "hippocampus_mr", "preset": str(folder / "two.yaml"), "retrain": "off"}
    server = Server(folder, conf)
    _write_studies(server.studies)
    preset = tiny_preset(**changes)
    torch.manual_seed(0)
    write_checkpoint(server.models / "two" / "shipped.pt", Checkpoint(dict(build_unetr(preset).state_dict()), preset))
    server.start()
    wait_until(lambda: _flair_series(server) in server.get("/datastore/?output=all").json()["objects"])
    yield server
    server.stop()


def _series(server: Server, folder: str) -> str:
    file = next((server.studies / "dicom" / folder).iterdir())
    return str(dcmread(file, stop_before_pixels=True).SeriesInstanceUID)


def _flair_series(server: Server) -> str:
    return _series(server, "IR")


def test_cases_are_listed_once_with_what_they_lack(two: Server) -> None:
    listed = two.get("/datastore/?output=all").json()["objects"]
    assert sorted(listed) == sorted(["no_t1", "single", "stacked", "suffixed", _flair_series(two), *LABELLED])
    problems = two.get("/datastore/problems").json()["files"]
    assert [(one["name"], one["reason"][:24]) for one in problems] == [("no_flair", "lacks the channel flair,")]
    for image, words in (
        ("no_t1", "case 'no_t1' lacks the channels t1"),
        ("single", "'two' needs the channels t1, flair"),
    ):
        check = two.post(f"/datastore/image/check?image={image}").json()["checks"]["two"]
        assert words in check["problem"]
    asked = {"client_id": "anna", "model": "two"}
    offered = [
        two.post("/activelearning/first", json=asked | {"client_id": f"u{n}"}).json().get("id") for n in range(10)
    ]
    assert sorted(filter(None, offered)) == sorted(["stacked", "suffixed", _flair_series(two), *LABELLED])
    assert {"no_t1", "single"} <= set(two.get("/datastore/problems").json()["left_out"]["two"])


def test_download_is_the_display_channel(two: Server, tmp_path: Path) -> None:
    _, flair, _ = _case(100)
    for image in ("suffixed", "stacked"):
        file = tmp_path / f"{image}.nii.gz"
        file.write_bytes(two.get(f"/datastore/image?image={image}").content)
        read = nib.load(file)
        assert read.shape == SHAPE
        np.testing.assert_allclose(read.get_fdata(), flair, rtol=1e-5)


def test_all_channels_reach_the_network_and_the_answer_says_how(two: Server, tmp_path: Path) -> None:
    parts = parse_multipart(two.infer("two", "suffixed"))
    said = json.loads(parts["params"][1])
    mask, _ = read_nrrd(parts["image"][1], tmp_path)
    assert mask.shape == SHAPE
    assert said["channels"] == ["t1", "flair", "t2"]
    assert "channel t1 was resampled onto the grid of flair" in said["warnings"]
    assert "the optional channel t2 is missing: the network was given zeros" in said["warnings"]
    assert json.loads(parse_multipart(two.infer("two", "suffixed"))["params"][1])["cache"]["hit"] is True
    write_nifti(two.studies / "suffixed_0000.nii.gz", np.flip(_case(100)[0][::2, ::2, ::2]).copy(), COARSE)
    parts = parse_multipart(two.infer("two", "suffixed"))
    assert json.loads(parts["params"][1])["cache"]["hit"] is False, "T1 has changed"
    assert (read_nrrd(parts["image"][1], tmp_path)[0] != mask).any()
    stacked = json.loads(parse_multipart(two.infer("two", "stacked"))["params"][1])
    assert not any("channel" in warning for warning in stacked["warnings"])


def test_worker_makes_the_masks_of_the_server_from_its_folder_and_from_its_address(two: Server, tmp_path: Path) -> None:
    preset = two.models.parent / "two.yaml"
    command = ["--model", str(preset), "--model-dir", str(two.models), "--engine", "pytorch", "--devices", "cpu"]

    def run(studies: str, name: str, code: int = 1) -> dict[str, Any]:
        assert segment([*command, "--studies", studies, "--out", str(tmp_path / name)]) == code
        said: dict[str, Any] = json.loads((tmp_path / name / "summary.json").read_text())
        return said

    cases = sorted(["stacked", "suffixed", _flair_series(two), *LABELLED])
    here = run(str(two.studies), "here")
    assert [case["case"] for case in here["cases"]] == cases
    assert {name: reason for name, reason in here["failed"].items()} == {
        "no_t1": "case 'no_t1' lacks the channels t1",
        "no_flair": "case 'no_flair' lacks the channels flair",
    }
    there = run(two.url, "there")
    assert [case["case"] for case in there["cases"]] == cases
    assert sorted(there["failed"]) == ["no_t1", "single"] and "lacks the channels t1" in there["failed"]["no_t1"]
    of_study = run(f"{two.url}/dicom-web?PatientID=SYNTH-9", "pacs", code=0)
    assert [case["case"] for case in of_study["cases"]] == [_flair_series(two)]
    for case in cases:
        served, _ = read_nrrd(parse_multipart(two.infer("two", case))["image"][1], tmp_path)
        folders = ("here", "there", *(["pacs"] if case == _flair_series(two) else []))
        masks = [np.asarray(nib.load(tmp_path / folder / f"{case}.nii.gz").dataobj) for folder in folders]
        assert all(np.array_equal(mask, masks[0]) for mask in masks), f"{case} has several masks"
        # the server may compute with another number of threads
        assert masks[0].shape == served.shape and np.mean(masks[0] == served) > 0.999
    warned = {case["case"]: case["warnings"] for case in here["cases"]}
    assert "channel t1 was resampled onto the grid of flair" in warned["suffixed"]
    for name, studies in (("here", str(two.studies)), ("there", two.url)):
        assert run(studies, name)["finished_before"] == len(cases), "nothing has changed"
    assert run(f"{two.url}/dicom-web?PatientID=SYNTH-9", "pacs", code=0)["finished_before"] == 1
    t1, flair, _ = _case(101)
    before = (two.studies / "stacked.nii.gz").read_bytes()
    write_nifti(two.studies / "stacked.nii.gz", np.stack([t1, flair, flair], axis=-1))
    for name, studies in (("here", str(two.studies)), ("there", two.url)):
        assert run(studies, name)["finished_now"] == 1, "one sequence's file has changed"
    (two.studies / "stacked.nii.gz").write_bytes(before)


def test_a_missing_channel_is_refused_with_a_sentence(two: Server) -> None:
    answer = two.infer("two", "no_t1")
    assert 400 <= answer.status_code < 500
    assert "case 'no_t1' lacks the channels t1" in answer.json()["detail"]


def test_two_series_are_segmented_together_and_the_seg_is_of_the_one_that_is_shown(two: Server) -> None:
    shown, t1 = _flair_series(two), _series(two, "T1")
    said = two.post(f"/infer/two?image={shown}&output=json").json()
    assert "channel t1 was resampled onto the grid of flair" in said["warnings"]
    seg = dcmread(io.BytesIO(two.post(f"/infer/two?image={shown}&output=dicom_seg").content))
    assert [one.SeriesInstanceUID for one in seg.ReferencedSeriesSequence] == [shown]
    refused = two.infer("two", t1)
    assert refused.status_code == 400 and f"{shown}, the case of which" in refused.json()["detail"]


def test_ohif_and_the_case_page_show_the_display_channel_and_the_page_the_others_too(two: Server) -> None:
    uid = uid_of("stacked", "series")
    study = uid_of("stacked", "study")
    found = two.get(f"/dicom-web/studies/{study}/series/{uid}/metadata").json()
    assert len(found) == SHAPE[2]
    page = two.get("/case/stacked").text
    assert all(f'name="channel" value="{value}"' in page for value in ("", "t1", "t2"))
    address = "/case/stacked/slice.png?plane=axial&index=9"
    shown, t1, t2 = (two.get(f"{address}{more}").content for more in ("", "&channel=t1", "&channel=t2"))
    assert shown == t2 and shown != t1, "the case's t2 is its flair"
    wrong = two.get(f"{address}&channel=pd")
    assert wrong.status_code == 400 and "valid: flair, t1, t2" in wrong.json()["detail"]
    assert 'name="channel"' not in two.get("/case/single").text


def test_sessions_and_uploads_take_the_files_of_a_case(two: Server, tmp_path: Path) -> None:
    t1, flair, _ = _case(50)
    sent = {
        "p_T1.nii.gz": write_nifti(tmp_path / "t1.nii.gz", t1[::2, ::2, ::2], COARSE).read_bytes(),
        "p_FLAIR.nii.gz": write_nifti(tmp_path / "flair.nii.gz", flair).read_bytes(),
    }
    files = [("files", (name, content, "application/gzip")) for name, content in sent.items()]
    session = two.put("/session/", files=files)
    assert session.status_code == 200, session.text
    answer = two.infer("two", session=session.json()["session_id"])
    assert answer.status_code == 200, answer.text
    assert read_nrrd(parse_multipart(answer)["image"][1], tmp_path)[0].shape == SHAPE
    parts = [("file", one[1]) for one in files]
    added = two.put("/datastore/?image=sent", files=parts)
    assert (added.status_code, added.json()["image"]) == (200, "sent")
    assert sorted(path.name for path in (two.studies / "sent").iterdir()) == ["flair.nii.gz", "t1.nii.gz"]
    from_studies, _ = read_nrrd(parse_multipart(two.infer("two", "sent"))["image"][1], tmp_path)
    np.testing.assert_array_equal(from_studies, read_nrrd(parse_multipart(answer)["image"][1], tmp_path)[0])
    assert two.put("/datastore/?image=sent", files=parts).status_code == 409
    lacking = two.put("/datastore/?image=other", files=[parts[1], ("file", ("x.nii.gz", sent["p_T1.nii.gz"]))])
    assert lacking.status_code == 422 and "lacks the channels t1" in lacking.json()["detail"]
    assert two.delete("/datastore/?id=sent").status_code == 200
    assert not (two.studies / "sent").exists()


def test_a_session_takes_the_files_of_two_series(two: Server, tmp_path: Path) -> None:
    sent = sorted((two.studies / "dicom").rglob("*.dcm"))
    files = [("files", (f"{number}.dcm", file.read_bytes())) for number, file in enumerate(sent)]
    session = two.put("/session/", files=files)
    assert session.status_code == 200, session.text
    said = json.loads(parse_multipart(two.infer("two", session=session.json()["session_id"]))["params"][1])
    assert "channel t1 was resampled onto the grid of flair" in said["warnings"]
    alone = two.put("/session/", files=[one for one, file in zip(files, sent, strict=True) if file.parent.name == "T1"])
    assert alone.status_code == 200, "the other preset takes one series"
    refused = two.infer("two", session=alone.json()["session_id"])
    assert refused.status_code == 422 and "needs the channels t1, flair, t2" in refused.json()["detail"]


def test_clicks_correct_a_case_on_what_is_shown(two: Server, tmp_path: Path) -> None:
    answer = two.infer("two_edit", "stacked", **{"Left Box": [[9, 9, 7]], "core": []})
    assert answer.status_code == 200, answer.text
    mask, _ = read_nrrd(parse_multipart(answer)["image"][1], tmp_path)
    assert mask.shape == SHAPE and mask[9, 9, 7] == 1
    check_prompts(two, "two_edit", {"image": "stacked"}, {"Left Box": 1, "core": 2}, tmp_path)


def test_corrections_are_trained_on_and_the_gate_decides(two: Server, tmp_path: Path) -> None:
    for number, name in enumerate(LABELLED):
        label = encode(_case(number)[2], np.eye(4), tmp_path)
        params = {"label_info": [{"name": "Left Box", "idx": 1}, {"name": "core", "idx": 2}], "model": "two"}
        files = {"params": (None, json.dumps(params)), "label": ("label.nii.gz", label, "application/gzip")}
        saved = two.put("/datastore/label", params={"image": name, "tag": "final"}, files=files)
        assert saved.status_code == 200, saved.text
    assert two.post("/train/two", json={"max_epochs": 12, "val_split": 0.3, "seed": 1}).status_code == 200
    ended = two.wait_for("/train/", seconds=300)
    assert ended["status"] == "DONE", "\n".join(ended["details"])
    stats = two.get("/info/").json()["train_stats"]["two"]
    assert stats["status"] == "unproven", stats
    assert "nothing is known of how well the served weights do" in stats["decision"], "they are random"
    assert two.post(f"/model/versions/two/{stats['version']}/serve").json() == {"live": stats["version"]}
    said = two.post("/infer/two?image=stacked&output=json").json()
    assert (said["model"]["version"], said["channels"]) == (stats["version"], ["t1", "flair", "t2"])


@pytest.mark.slow
def test_batch_inference_and_scoring_take_all_channels(two: Server) -> None:
    assert two.post("/batch/infer/two", json={"images": "unlabeled", "max_batch_size": 20}).status_code == 200
    ended = two.wait_for("/batch/infer", seconds=300)
    assert ended["status"] == "DONE", "\n".join(ended["details"])
    labelled = {
        image: two.request("HEAD", f"/datastore/label?tag=original&image={image}").ok
        for image in ("stacked", "suffixed", _flair_series(two), "no_t1")
    }
    assert labelled == {"stacked": True, "suffixed": True, _flair_series(two): True, "no_t1": False}
    assert two.post("/scoring/all?run_sync=true", json={"model": "two", "minutes": 3}).status_code == 200
    left_out = two.get("/datastore/problems").json()["left_out"]["two"]
    assert "stacked" not in left_out and "lacks the channels t1" in left_out["no_t1"]
