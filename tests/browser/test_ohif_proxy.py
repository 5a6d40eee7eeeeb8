"""OHIF behind a proxy with a path before the server's, two presets, an MR and a CT series."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from dicom_series import SeriesIdentity, write_series
from pydicom import dcmread
from pydicom.uid import generate_uid
from selenium.webdriver.remote.webdriver import WebDriver
from synthetic_hippocampus import draw_cases

from lib.dicom.series import read_series
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


@pytest.mark.parametrize(("kind", "sentence"), [("tilted", "tilted by 14.0 degrees"), ("doubled", "cannot show")])
def test_series_that_the_viewer_cannot_show_is_explained(
    hospital: Hospital, open_browser: Callable[..., WebDriver], kind: str, sentence: str
) -> None:
    """Beside the tilted and the uneven series the server's own reading of them is tested in tests/dicom."""
    case = next(iter(draw_cases(1, seed=9)))
    folder = hospital.server.studies / kind
    files = write_series(folder, case.image, case.affine_ras, SeriesIdentity(f"SYNTH-{kind}", "MR", kind, 30))
    for number, file in enumerate(files):
        instance = dcmread(file)
        if kind == "tilted":
            instance.ImagePositionPatient[1] += 0.249 * number
            instance.save_as(file)
        elif number in (3, 4):
            instance.SOPInstanceUID = generate_uid()
            instance.file_meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID
            instance.save_as(file.with_name(f"again-{number}.dcm"))
    study = str(instance.StudyInstanceUID)
    wait_until(lambda: hospital.server.get(f"/dicom-web/studies/{study}/series").status_code == 200)
    viewer = Viewer(open_browser(1400, 900), hospital.proxy.url)
    viewer.browser.get(f"{hospital.proxy.url}/ohif/monai-label?StudyInstanceUIDs={study}")
    viewer.wait_for(lambda: sentence in viewer.text)


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
