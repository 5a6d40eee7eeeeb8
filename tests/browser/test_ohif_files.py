"""NIfTI cases in OHIF: opened as series, segmented, corrected with the brush, and submitted."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator

import nibabel as nib
import numpy as np
import pytest
from selenium.webdriver.remote.webdriver import WebDriver
from synthetic_hippocampus import SyntheticCase, draw_cases

from lib.dicom.presented.grid import SeriesGrid
from tests.browser.viewer import Viewer
from tests.integration.conftest import prepare
from tests.integration.server import Server
from tests.tiny import axis_affine, oblique_affine

pytestmark = pytest.mark.browser
SHEARED = np.array([[1, 0, 0.3, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
GRIDS = {"las": axis_affine("LAS", (1, 1, 1), (20, -30, 10)), "oblique": oblique_affine("RAS"), "sheared": SHEARED}
NUMBERS = {"background": 0, "anterior": 1, "posterior": 2}


@pytest.fixture(scope="module")
def case() -> SyntheticCase:
    """The one case that lies on every grid."""
    (drawn,) = draw_cases(1, seed=6)
    return drawn


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, case: SyntheticCase) -> Iterator[Server]:
    """A server whose studies are NIfTI files."""
    server = prepare(Server(tmp_path_factory.mktemp("files"), {"models": "hippocampus_mr"}), {})
    for name, affine in GRIDS.items():
        nib.save(nib.Nifti1Image(case.image, affine), server.studies / f"{name}.nii.gz")
    yield server.start()
    server.stop()


@pytest.mark.parametrize("name", GRIDS)
def test_file_is_segmented_corrected_and_submitted_on_its_own_grid(
    files: Server,
    name: str,
    open_browser: Callable[..., WebDriver],
    keep_screenshot: Callable[[WebDriver, str], object],
) -> None:
    viewer = Viewer(open_browser(1400, 900), files.url)
    assert name in viewer.studies(name)
    found = files.get("/dicom-web/series", params={"PatientID": name}).json()
    study, series = (found[0][tag]["Value"][0] for tag in ("0020000D", "0020000E"))
    viewer.open(study, series)
    viewer.connect()
    viewer.segment()
    predicted = viewer.labelmap().copy()
    keep_screenshot(viewer.browser, f"ohif-file-{name}-prediction")
    viewer.paint()
    viewer.wait_for(lambda: (viewer.labelmap() != predicted).any())
    edited, names = viewer.labelmap(), viewer.segment_names()
    viewer.submit()

    content = files.get("/datastore/label", params={"label": name, "tag": "final"}).content
    label = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    np.testing.assert_allclose(label.affine, GRIDS[name], atol=1e-5)
    table = np.zeros(256, np.uint8)
    for number, segment in names.items():
        table[number] = NUMBERS[segment]
    expected = on_file(viewer, table[edited], GRIDS[name], label.shape)
    np.testing.assert_array_equal(np.asarray(label.dataobj), expected)
    keep_screenshot(viewer.browser, f"ohif-file-{name}-submitted")

    again = Viewer(open_browser(1400, 900), files.url)
    shown = again.open_segmentation(study)
    assert {segment for segment, _ in shown} == {"anterior", "posterior"}
    keep_screenshot(again.browser, f"ohif-file-{name}-again")


def on_file(viewer: Viewer, labelmap: np.ndarray, affine_ras: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The viewer's labelmap on the grid of the file, by the places that the viewer gives its voxels."""
    image_data = "services.segmentationService.getLabelmapVolume('1').imageData"
    origin, direction, spacing = viewer.run(
        f"const i = {image_data}; return [i.getOrigin(), i.getDirection(), i.getSpacing()].map(v => Array.from(v))"
    )
    to_lps = np.eye(4)
    to_lps[:3, :3] = np.array(direction).reshape(3, 3).T * spacing
    to_lps[:3, 3] = origin
    grid = SeriesGrid.of((shape[0], shape[1], shape[2]), affine_ras)
    to_series = np.linalg.inv(grid.affine_lps) @ to_lps
    indices = np.argwhere(labelmap)
    places = indices @ to_series[:3, :3].T + to_series[:3, 3]
    np.testing.assert_allclose(places, np.rint(places), atol=0.02)
    found = np.zeros(shape, np.uint8)
    in_file = np.array([grid.index_in_file(place) for place in np.rint(places)]).astype(int)
    found[tuple(in_file.T)] = labelmap[tuple(indices.T)]
    return found
