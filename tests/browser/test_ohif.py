"""A radiologist's way in OHIF, with the studies in a folder and again in a PACS: list, open, connect, run, correct with
the brush, submit, train, take the next case."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from dicom_series import SeriesIdentity, write_series
from scipy import ndimage
from selenium.webdriver.remote.webdriver import WebDriver
from synthetic_hippocampus import draw_cases

from lib.configs.catalogue import load_preset
from lib.dicom.series import Series, read_series
from tests.browser.viewer import Viewer
from tests.integration.conftest import prepare
from tests.integration.pacs import PASSWORD, USER, Orthanc
from tests.integration.server import Server, parse_multipart, wait_until

pytestmark = pytest.mark.browser
PRESET_NUMBERS = {"anterior": 1, "posterior": 2}
CHANGED = 2
"""Grey levels by which a pixel changes where the overlay lies on it, of any colour."""


class Clinic:
    """A server with three patients, of whom the last has two series in one study."""

    def __init__(self, folder: Path, with_pacs: bool) -> None:
        cases = list(draw_cases(4, seed=6))
        plans = [("SYNTH-A", 0, 0), ("SYNTH-B", 1, 1), ("SYNTH-C", 2, 2), ("SYNTH-C", 2, 3)]
        self.files = [
            write_series(
                folder / "files" / f"{n}",
                cases[n].image,
                cases[n].affine_ras,
                SeriesIdentity(patient, "MR", f"T1 {n}", seed),
            )
            for patient, seed, n in plans
        ]
        self.series = [read_series(files) for files in self.files]
        self.orthanc = Orthanc(folder / "orthanc") if with_pacs else None
        password = {"MONAI_LABEL_DICOMWEB_USERNAME": USER, "MONAI_LABEL_DICOMWEB_PASSWORD": PASSWORD}
        address = self.orthanc.dicomweb if self.orthanc else ""
        conf = {"models": "hippocampus_mr"}
        self.server = prepare(Server(folder / "server", conf, dicomweb=address, environment=password), {})
        for number, files in enumerate(self.files):
            if self.orthanc:
                self.orthanc.add(files)
            else:
                files[0].parent.rename(self.server.studies / f"series-{number}")
        self.server.start()
        wait_until(lambda: self.server.get("/datastore/").json()["total"] == 4)

    def study(self, number: int) -> str:
        return str(self.series[number].header.StudyInstanceUID)

    def label(self, number: int) -> np.ndarray:
        """The newest final label of a series, shape (columns, rows, slices)."""
        content = self.server.get(f"/datastore/label?label={self.series[number].uid}&tag=final").content
        return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)

    def stop(self) -> None:
        if self.server.process is not None:
            self.server.stop()
        if self.orthanc:
            self.orthanc.stop()


@pytest.fixture(scope="module", params=["folder", pytest.param("orthanc", marks=pytest.mark.orthanc)])
def clinic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    made = Clinic(tmp_path_factory.mktemp("ohif"), request.param == "orthanc")
    yield made
    made.stop()


def test_radiologist_corrects_and_submits(
    clinic: Clinic,
    request: pytest.FixtureRequest,
    open_browser: Callable[..., WebDriver],
    keep_screenshot: Callable[[WebDriver, str], Path],
) -> None:
    where = request.node.callspec.params["clinic"]
    viewer = Viewer(open_browser(1400, 900), clinic.server.url)
    listed = viewer.studies("SYNTH-A")
    assert all(patient in listed for patient in ("SYNTH-A", "SYNTH-B", "SYNTH-C"))
    keep_screenshot(viewer.browser, f"ohif-{where}-list")

    viewer.open(clinic.study(0), clinic.series[0].uid)
    assert "SYNTH-B" not in viewer.text, "the side panel lists this patient only"
    viewer.connect()
    series = clinic.series[0]
    slices = [viewer.slices() * part // 8 for part in (3, 4, 5)]
    before = {number: viewer.jump(number) for number in slices}
    viewer.segment()
    predicted = in_preset_numbers(viewer)
    for number in slices:
        check_overlay(viewer, series, predicted, number, *before[number])
    keep_screenshot(viewer.browser, f"ohif-{where}-prediction")

    viewer.paint()
    viewer.wait_for(lambda: (in_preset_numbers(viewer) != predicted).any())
    edited = in_preset_numbers(viewer)
    viewer.submit()
    keep_screenshot(viewer.browser, f"ohif-{where}-submitted")
    np.testing.assert_array_equal(clinic.label(0), edited)
    check_version(clinic, edited, predicted)
    check_retraining(viewer, clinic)
    keep_screenshot(viewer.browser, f"ohif-{where}-training")


def in_preset_numbers(viewer: Viewer) -> np.ndarray:
    """The viewer's labelmap in the numbers of the preset; its slices may run the other way than the server's."""
    labelmap, names = viewer.labelmap(), viewer.segment_names()
    table = np.zeros(256, np.uint8)
    for number, name in names.items():
        table[number] = PRESET_NUMBERS[name] if name != "background" else 0
    return table[labelmap]


def check_overlay(
    viewer: Viewer, series: Series, mask: np.ndarray, number: int, before: np.ndarray, focal: np.ndarray
) -> None:
    """In a slice the pixels of the mask's voxels have changed colour, and no others."""
    after, _ = viewer.jump(number)
    changed = np.abs(after - before).max(axis=-1) > CHANGED
    slice_index = int(np.rint((np.linalg.inv(series.affine_lps) @ [*focal, 1])[2]))
    columns, rows = np.indices(mask.shape[:2]).reshape(2, -1)
    voxels = np.stack([columns, rows, np.full(columns.size, slice_index), np.ones(columns.size)])
    points = np.rint(viewer.canvas_points((series.affine_lps @ voxels)[:3].T)).astype(int)
    inside = ((points >= 0) & (points < [after.shape[1], after.shape[0]])).all(axis=1)
    painted = changed[points[inside, 1], points[inside, 0]]
    expected = mask[:, :, slice_index].ravel()[inside] > 0
    assert expected.sum() > 20, "the slice has something to show"
    assert painted[expected].mean() > 0.97, (number, painted[expected].mean())
    assert painted[~expected].mean() < 0.01, (number, painted[~expected].mean())


def check_version(clinic: Clinic, edited: np.ndarray, predicted: np.ndarray) -> None:
    """The label is a version that knows where it came from, and a DICOM SEG is beside its series."""
    series = clinic.series[0]
    (version,) = clinic.server.get(f"/datastore/label/versions?image={series.uid}&tag=final").json()
    assert version["label_map"] == PRESET_NUMBERS
    assert version["voxels_changed"] == int((edited != predicted).sum())
    assert clinic.server.get("/datastore/").json()["completed"] == 1
    found = clinic.server.get(f"/dicom-web/studies/{clinic.study(0)}/series?Modality=SEG").json()
    assert len(found) == 1


def check_retraining(viewer: Viewer, clinic: Clinic) -> None:
    """Update Model starts a training whose epochs the panel shows."""
    viewer.open_tab("Active Learning")
    button = viewer.wait_for(
        lambda: next(e for e in viewer.panel.find_elements("tag name", "button") if e.text == "Update Model")
    )
    viewer.browser.execute_script("arguments[0].click()", button)
    viewer.wait_for(lambda: "Stop Training" in viewer.panel.text)
    wait_until(lambda: clinic.server.get("/train/").json()["status"] == "RUNNING")
    wait_until(lambda: progress(clinic.server).get("epoch", 0) >= 1, 120)
    viewer.panel.find_element("css selector", "button").click()  # asks the server anew
    viewer.wait_for(lambda: viewer.panel.find_elements("css selector", "[title*='epochs completed']"))
    assert clinic.server.delete("/train/").status_code == 200
    clinic.server.wait_for("/train/")


def progress(server: Server) -> dict[str, Any]:
    stats: dict[str, Any] = server.get("/info/").json()["train_stats"]["hippocampus_mr"]
    return stats


def test_next_sample_opens_the_series_that_it_names(clinic: Clinic, open_browser: Callable[..., WebDriver]) -> None:
    """Also where its study has another series, which the viewer would open first."""
    viewer = Viewer(open_browser(1400, 900), clinic.server.url)
    for number in (2, 3):
        hand_out(clinic, number)
        viewer.open(clinic.study(number), clinic.series[number].uid)


def test_point_prompts_change_the_clicked_label_alone_and_are_submitted(
    clinic: Clinic,
    request: pytest.FixtureRequest,
    open_browser: Callable[..., WebDriver],
    keep_screenshot: Callable[[WebDriver, str], Path],
) -> None:
    """A click adds, one on the background takes away, nothing else changes, and what is shown is what is stored."""
    viewer, number = Viewer(open_browser(1400, 900), clinic.server.url), 3
    hand_out(clinic, number)
    viewer.open(clinic.study(number), clinic.series[number].uid)
    viewer.connect()
    viewer.segment()
    predicted = in_preset_numbers(viewer)
    added, taken = voxel_beside(predicted, 2), voxel_inside(predicted, 2)

    viewer.choose_prompt("posterior")
    viewer.click_voxel(added)
    assert viewer.clicked() == [added]
    viewer.run_prompts()
    viewer.wait_for(lambda: (in_preset_numbers(viewer) != predicted).any())
    first = in_preset_numbers(viewer)
    assert first[added] == 2
    np.testing.assert_array_equal(first == 1, predicted == 1)
    assert set(np.unique(first[first != predicted])) == {2}, "a click that adds takes nothing away"
    keep_screenshot(viewer.browser, f"ohif-{request.node.callspec.params['clinic']}-click")

    viewer.choose_prompt("background")
    assert viewer.clicked() == [], "the clicks of another label are not shown"
    viewer.click_voxel(taken)
    viewer.run_prompts()
    viewer.wait_for(lambda: (in_preset_numbers(viewer) != first).any())
    second = in_preset_numbers(viewer)
    assert second[taken] == 0 and second[added] == 2
    np.testing.assert_array_equal(second == 1, predicted == 1)
    keep_screenshot(viewer.browser, f"ohif-{request.node.callspec.params['clinic']}-clicks")
    viewer.submit()
    np.testing.assert_array_equal(clinic.label(number), second)


def voxel_beside(mask: np.ndarray, value: int) -> tuple[int, int, int]:
    """A voxel of the background that is three voxels away from a label, in the axial slice with most of it."""
    z = int((mask == value).sum(axis=(0, 1)).argmax())
    away = ndimage.distance_transform_edt(mask == 0)[..., z]
    to_label = ndimage.distance_transform_edt(mask != value)[..., z]
    x, y = np.argwhere((away >= 3) & (to_label < 4))[0]
    return int(x), int(y), z


def voxel_inside(mask: np.ndarray, value: int) -> tuple[int, int, int]:
    """The deepest voxel of a label in the axial slice with most of it."""
    z = int((mask == value).sum(axis=(0, 1)).argmax())
    depth = ndimage.distance_transform_edt(mask[..., z] == value)
    x, y = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(x), int(y), z


def hand_out(clinic: Clinic, number: int) -> None:
    """Ask for next samples, as the panel does, until a series is named; the others are given back."""
    wanted = clinic.series[number].uid
    for _ in range(40):
        chosen = clinic.server.post("/activelearning/random", json={}).json()
        assert chosen["StudyInstanceUID"] in {clinic.study(n) for n in range(4)}
        clinic.server.delete(f"/leases/?image={chosen['id']}")
        if chosen["id"] == wanted:
            return
    raise AssertionError("the series was never chosen")


def test_segmentation_made_here_opens_with_names_and_colours(
    clinic: Clinic,
    request: pytest.FixtureRequest,
    open_browser: Callable[..., WebDriver],
    keep_screenshot: Callable[[WebDriver, str], Path],
) -> None:
    """In the viewer's own Segmentation mode, from the DICOM SEG that is beside a submitted label."""
    series, preset = clinic.series[1], load_preset("hippocampus_mr")
    content = clinic.server.infer("hippocampus_mr", series.uid, result_extension=".nii.gz", result_compress=True)
    mask = clinic.server.folder / "mask.nii.gz"
    mask.write_bytes(parse_multipart(content)["image"][1])
    assert clinic.server.save_label(series.uid, mask.read_bytes(), ["anterior", "posterior"]).status_code == 200
    viewer = Viewer(open_browser(1400, 900), clinic.server.url)
    opened = viewer.open_segmentation(clinic.study(1))
    assert {name: color for name, color in opened} == {
        label.name: pytest.approx(label.color, abs=1) for label in preset.labels
    }
    keep_screenshot(viewer.browser, f"ohif-{request.node.callspec.params['clinic']}-segmentation")


def test_wrong_submission_is_told_in_the_servers_words(clinic: Clinic, open_browser: Callable[..., WebDriver]) -> None:
    viewer = Viewer(open_browser(1400, 900), clinic.server.url)
    viewer.open(clinic.study(1))
    viewer.press("[data-cy='UnetrSubmit']")
    viewer.wait_for(lambda: "There is no segmentation yet" in viewer.text)
    assert requests.get(f"{clinic.server.url}/ohif/app-config.js", timeout=60).text.startswith("/*")
