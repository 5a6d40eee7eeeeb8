"""Queries over files that are presented as series: nothing is opened for a list."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any, NoReturn

import nibabel as nib
import numpy as np
import pytest

from lib.configs.catalogue import load_preset
from lib.dicom.attributes import to_json
from lib.dicom.query import search
from lib.dicom.resources import parse_path
from lib.server.presented.cases import PresentedCases, Searched
from lib.server.presented.labels import PresentedLabels
from lib.storage.disk import MIB

CASES = 2_000
ROOT = "http://server/dicom-web"
OHIF_FIELDS = ("includefield", "00081030,00080060")


class NoLabels:
    """A history without a label."""

    def all_latest(self) -> list[Any]:
        return []


class ManyFiles:
    """A studies folder of many NIfTI files."""

    def list_images(self) -> list[str]:
        return [f"case_{number:05d}" for number in range(CASES)]

    def has_image(self, image_id: str) -> bool:
        return image_id.startswith("case_")

    @property
    def history(self) -> NoLabels:
        return NoLabels()

    def is_series(self, image_id: str) -> bool:
        return False


class NoHistory:
    """A history that must not be asked for the labels of all cases."""

    def all_latest(self) -> NoReturn:
        raise AssertionError("the labels of all cases were looked at")


class _Store:
    """Studies whose labels must not be listed."""

    @property
    def history(self) -> NoHistory:
        return NoHistory()


class NoSeries:
    """An index without any DICOM file."""

    def entries(self) -> list[Any]:
        return []


def never_opened(image_id: str) -> NoReturn:
    raise AssertionError(f"{image_id} was opened")


@pytest.fixture(scope="module")
def searched() -> Searched:
    many: Any = ManyFiles()
    presets = {name: load_preset(name) for name in ("hippocampus_mr", "abdomen_ct")}

    def file_of(image_id: str) -> Path:
        never_opened(image_id)

    return Searched(NoSeries(), PresentedCases(many, file_of, presets, 0))


@pytest.mark.parametrize("level", ["studies", "series"])
def test_list_is_paged_with_the_fields_that_viewers_ask_for_and_opens_no_file(searched: Searched, level: str) -> None:
    seen: list[str] = []
    for offset in range(0, CASES, 500):
        pairs = [("limit", "500"), ("offset", str(offset)), ("fuzzymatching", "true"), OHIF_FIELDS]
        found = search(searched, parse_path(level), pairs, ROOT)
        assert all(entry["00081030"]["Value"] == entry["00100020"]["Value"] for entry in found)
        seen += [entry["00100020"]["Value"][0] for entry in found]
    assert sorted(seen) == ManyFiles().list_images()


def test_search_by_a_patients_name_and_a_studys_series_open_no_file(searched: Searched) -> None:
    (study,) = search(searched, parse_path("studies"), [("00100020", "case_00017"), OHIF_FIELDS], ROOT)
    uid = study["0020000D"]["Value"][0]
    (series,) = search(searched, parse_path(f"studies/{uid}/series"), [("includefield", "all")], ROOT)
    assert series["0008103E"]["Value"] == ["from a file"]
    assert series["00080060"]["Value"] == ["MR"]


def test_series_of_a_file_is_no_label_without_a_look_at_all_labels() -> None:
    """Each frame that a viewer loads asks whether its series is a label's."""
    many: Any = ManyFiles()
    presented = PresentedCases(many, never_opened, {"hippocampus_mr": load_preset("hippocampus_mr")}, 0)
    series = presented.attributes("case_00017")["SeriesInstanceUID"]
    store: Any = _Store()
    labels = PresentedLabels(presented, store, {})
    assert labels.find(series) is None


class FolderOfFiles(ManyFiles):
    """Studies whose files are all alike, and do not change."""

    def stamp(self, image_id: str) -> str:
        return "1"


SLICES = 60


def of_slices(folder: Path, most_bytes: int) -> tuple[PresentedCases, list[str]]:
    """Cases whose file has many small slices, and the UIDs of their series."""
    file = folder / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.arange(8 * 8 * SLICES, dtype=np.int16).reshape(8, 8, SLICES), np.eye(4)), file)
    many: Any = FolderOfFiles()
    presets = {"hippocampus_mr": load_preset("hippocampus_mr")}
    presented = PresentedCases(many, lambda image_id: file, presets, most_bytes)
    return presented, [presented.attributes(image_id)["SeriesInstanceUID"] for image_id in many.list_images()[:21]]


def test_opened_case_leaves_few_objects_for_garbage_collections_to_walk_over(tmp_path: Path) -> None:
    """With 24 small cases open, a collection stopped every answer for a quarter of a second now and then."""
    presented, uids = of_slices(tmp_path, 64 * MIB)
    presented.metadata_texts(series=uids[0])
    gc.collect()
    before = len(gc.get_objects())
    for uid in uids[1:]:
        presented.metadata_texts(series=uid)
    gc.collect()
    assert (len(gc.get_objects()) - before) / (20 * SLICES) < 40


def test_headers_of_opened_cases_are_what_clients_get_and_do_not_grow(tmp_path: Path) -> None:
    """Each slice that was sent left its pixels with its header, in memory that nothing counted."""
    presented, uids = of_slices(tmp_path, 64 * MIB)
    headers = presented.headers("", uids[0])
    told = [to_json(header) for header in headers]
    assert presented.metadata(series=uids[0]) == told
    assert [header.InstanceNumber for header in headers] == list(range(1, SLICES + 1))
    assert presented.with_pixels(headers[7]).pixel_array.shape == (8, 8)
    presented.file(headers[7])
    assert "PixelData" not in headers[7] and [to_json(header) for header in headers] == told


def test_headers_of_opened_cases_count_as_memory(tmp_path: Path) -> None:
    """A header takes ten times as much as the slice of a small image."""
    presented, uids = of_slices(tmp_path, 4 * MIB)
    presented.metadata(series=uids[0])
    tracemalloc.start()
    try:
        for uid in uids[1:]:
            presented.metadata(series=uid)
        gc.collect()  # what has left the cache may wait for it in cycles
        assert tracemalloc.get_traced_memory()[0] < 8 * MIB
    finally:
        tracemalloc.stop()
