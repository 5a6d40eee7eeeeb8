"""OHIF behind a proxy with a path before the server's, two presets, an MR and a CT series."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_series import SeriesIdentity, write_series
from pydicom import dcmread
from pydicom.uid import generate_uid
from selenium.webdriver.remote.webdriver import WebDriver
from synthetic_hippocampus import draw_cases

from lib.dicom.presented.upright import UprightGrid
from lib.dicom.series import Series, read_series
from tests.browser.proxy import Proxy
from tests.browser.viewer import Viewer
from tests.integration.conftest import prepare
from tests.integration.server import Server, wait_until

pytestmark = pytest.mark.browser
PREFIX = "/unetr"


class Hospital:
    """A server of two presets below a path, with an MR and a CT series."""

    def __init__(self, folder: Path) -> None:
        conf = {"models": "hippocampus_mr,abdomen_ct"}
        self.server = prepare(Server(folder / "server", conf, options=["--root_path", PREFIX]), {})
        cases = list(draw_cases(2, seed=8))
        self.series = [
            read_series(
                write_series(
                    self.server.studies / kind,
                    case.image,
                    case.affine_ras,
                    SeriesIdentity(f"SYNTH-{kind}", kind, f"series {kind}", number),
                )
            )
            for number, (kind, case) in enumerate(zip(("MR", "CT"), cases, strict=True))
        ]
        self.server.start()
        self.proxy = Proxy(self.server.url, PREFIX)
        wait_until(lambda: self.server.get("/datastore/").json()["total"] == 2)

    def study(self, number: int) -> str:
        return str(self.series[number].header.StudyInstanceUID)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    made = Hospital(tmp_path_factory.mktemp("proxy"))
    yield made
    made.proxy.stop()
    made.server.stop()


def test_radiologist_works_behind_a_proxy(
    hospital: Hospital,
    open_browser: Callable[..., WebDriver],
    keep_screenshot: Callable[[WebDriver, str], Path],
) -> None:
    """List, open, connect, run, an extra segment that stays empty, submit; nothing is asked of other servers."""
    viewer = Viewer(open_browser(1400, 900), hospital.proxy.url)
    assert "SYNTH-CT" in viewer.studies("SYNTH-MR")
    viewer.open(hospital.study(0), hospital.series[0].uid)
    viewer.connect()
    assert viewer.models() == ["hippocampus_mr"], "a model for CT is not offered for an MR"
    assert viewer.training() == "0%", "nobody has trained yet"
    side = min(hospital.series[0].shape[:2]) * 1.0
    assert viewer.brush_mm() == pytest.approx(0.04 * side, abs=0.25), "a small part of a slice"
    viewer.segment()
    viewer.run(
        "services.segmentationService.addSegment('1', {label: 'Segment 99'});"
        "services.segmentationService.setActiveSegment('1', 1)"
    )
    viewer.paint()
    keep_screenshot(viewer.browser, "ohif-proxy")
    viewer.submit()
    uid = hospital.series[0].uid
    (version,) = hospital.server.get(f"/datastore/label/versions?image={uid}&tag=final").json()
    assert (version["preset"], set(version["label_map"])) == ("hippocampus_mr", {"anterior", "posterior"})
    addresses = viewer.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert addresses and all(address.startswith(f"{hospital.proxy.url}/") for address in addresses)
    severe = [entry["message"] for entry in viewer.browser.get_log("browser") if entry["level"] == "SEVERE"]
    # MONAI Label's panel asks whether a training runs, and takes 404 for no
    assert [message for message in severe if "/train/?check_if_running=true" not in message] == []


def make_odd(hospital: Hospital, kind: str, number: int) -> Series:
    """A tilted series, or one with doubled slices, in a study of its own."""
    case = next(iter(draw_cases(1, seed=9)))
    folder = hospital.server.studies / kind
    files = write_series(folder, case.image, case.affine_ras, SeriesIdentity(f"SYNTH-{kind}", "MR", kind, 30 + number))
    for index, file in enumerate(files):
        instance = dcmread(file)
        if kind == "tilted":
            instance.ImagePositionPatient[1] += 0.249 * index
            instance.save_as(file)
        elif index in (3, 4):
            instance.SOPInstanceUID = generate_uid()
            instance.file_meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID
            instance.save_as(file.with_name(f"again-{index}.dcm"))
    series = read_series(sorted(folder.iterdir()))
    address = f"/dicom-web/studies/{series.header.StudyInstanceUID}/series"
    wait_until(lambda: len(hospital.server.get(address).json()) == 2)
    return series


@pytest.mark.parametrize(("kind", "sentence"), [("tilted", "tilted by 14.0 degrees"), ("doubled", "cannot show")])
def test_series_that_the_viewer_cannot_show_is_explained_and_its_regular_one_works(
    hospital: Hospital,
    open_browser: Callable[..., WebDriver],
    keep_screenshot: Callable[[WebDriver, str], Path],
    kind: str,
    sentence: str,
) -> None:
    source = make_odd(hospital, kind, ("tilted", "doubled").index(kind))
    study, address = str(source.header.StudyInstanceUID), f"{hospital.proxy.url}/ohif/monai-label?StudyInstanceUIDs="
    viewer = Viewer(open_browser(1400, 900), hospital.proxy.url)
    viewer.browser.get(f"{address}{study}&SeriesInstanceUIDs={source.uid}")
    viewer.wait_for(lambda: sentence in viewer.text)
    viewer.wait_for(lambda: f'Open the series "{kind} (regular: ' in viewer.text)

    told = hospital.server.get("/ohif/series", params={"study": study}).json()
    viewer.open(study, told["SeriesInstanceUID"])
    viewer.connect()
    viewer.segment()
    predicted = viewer.labelmap().copy()
    keep_screenshot(viewer.browser, f"ohif-{kind}-prediction")
    viewer.paint()
    viewer.wait_for(lambda: (viewer.labelmap() != predicted).any())
    edited, names = viewer.labelmap(), viewer.segment_names()
    viewer.submit()
    keep_screenshot(viewer.browser, f"ohif-{kind}-submitted")
    content = hospital.server.get("/datastore/label", params={"label": source.uid, "tag": "final"}).content
    label = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    np.testing.assert_allclose(label.affine, source.affine_ras, atol=1e-4)
    table = np.zeros(256, np.uint8)
    for number, name in names.items():
        table[number] = {"background": 0, "anterior": 1, "posterior": 2}.get(name, 0)
    grid = UprightGrid.of(source.shape, source.affine_ras)
    np.testing.assert_array_equal(np.asarray(label.dataobj), grid.to_file(in_order(viewer, table[edited], grid)))


def in_order(viewer: Viewer, labelmap: np.ndarray, grid: UprightGrid) -> np.ndarray:
    """The viewer's labelmap with its slices in the order of the grid, along its normal."""
    image_data = "services.segmentationService.getLabelmapVolume('1').imageData"
    first, last = viewer.run(
        f"const i = {image_data}; return [i.indexToWorld([0, 0, 0]), i.indexToWorld([0, 0, 1])].map(v => Array.from(v))"
    )
    along = float(np.dot(np.subtract(last, first), grid.affine_lps[:3, 2]))
    return labelmap if along > 0 else labelmap[:, :, ::-1]


def test_model_for_another_modality_warns(hospital: Hospital) -> None:
    uid = hospital.series[1].uid
    answer = hospital.server.infer("hippocampus_mr", uid)
    assert answer.status_code == 200
    sentence = "model hippocampus_mr is made for MR images, and this one is CT"
    assert sentence in answer.text
    assert "X-Warnings" in answer.headers
    assert "X-Warnings" not in hospital.server.infer("hippocampus_mr", hospital.series[0].uid).headers
    assert hospital.server.get(f"/datastore/image/info?image={uid}").json()["models"] == ["abdomen_ct"]


def test_viewer_shows_what_the_server_warns_of(hospital: Hospital, open_browser: Callable[..., WebDriver]) -> None:
    viewer = Viewer(open_browser(1400, 900), hospital.proxy.url)
    viewer.open(hospital.study(1))
    viewer.run(
        "const r = new XMLHttpRequest(); r.open('POST', arguments[0]); const f = new FormData();"
        "f.append('params', '{\"result_extension\": \".nrrd\"}'); r.send(f)",
        f"{hospital.proxy.url}/infer/hippocampus_mr?image={hospital.series[1].uid}&output=image",
    )
    viewer.wait_for(lambda: "is made for MR images, and this one is CT" in viewer.text)
    assert np.isfinite(viewer.slices())
