"""Which image a DICOM SEG is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from dicom_series import SeriesIdentity, write_series
from pydicom.dataset import Dataset
from torso_phantom import grid_affine

from lib.configs.catalogue import load_preset
from lib.datastore.series import SeriesDatastore, open_datastore
from lib.dicom.segmentation_writer import Origin, write_segmentation
from lib.dicom.series import Series, read_series
from lib.errors import LabelError
from lib.server.labels.segmentations import segmented_series

SHAPE = (24, 19, 11)


@pytest.fixture
def add_series(tmp_path: Path) -> Callable[..., Series]:
    """Add an MR series of one patient, whose series share a frame of reference, to the folder ``studies``."""

    def add(name: str, patient: str = "SYNTH-3", offset_mm: float = 0.0) -> Series:
        voxels = np.random.default_rng(len(name)).integers(0, 900, SHAPE)
        affine = grid_affine(SHAPE, (0.8, 0.9, 2.5), "LPS", (17, -9, 23), (offset_mm, 0.0, 0.0))
        return read_series(
            write_series(tmp_path / "studies" / name, voxels, affine, SeriesIdentity(patient, "MR", name))
        )

    return add


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], SeriesDatastore]]:
    monkeypatch.setattr("lib.datastore.series.settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
    stores: list[SeriesDatastore] = []

    def start() -> SeriesDatastore:
        stores.append(open_datastore(str(tmp_path / "studies"), ["MR"]))
        return stores[-1]

    yield start
    for store in stores:
        store.close()


def without_references(series: Series) -> Dataset:
    """A SEG of a series that does not say so, as some programs write it."""
    mask = np.ones(series.shape, np.uint8)
    seg = write_segmentation(mask, series, load_preset("hippocampus_mr"), Origin())
    del seg.ReferencedSeriesSequence
    for groups in (*seg.PerFrameFunctionalGroupsSequence, *seg.SharedFunctionalGroupsSequence):
        groups.pop("DerivationImageSequence", None)
    return seg


Add, Open = Callable[..., Series], Callable[[], SeriesDatastore]


def test_segmentation_without_references_is_of_the_series_in_its_frame_of_reference(
    add_series: Add, opened: Open
) -> None:
    series = add_series("one")
    add_series("other patient", "SYNTH-4")
    assert segmented_series(opened(), without_references(series)) == series.uid


def test_segmentation_without_references_is_of_the_series_on_whose_voxels_it_lies(
    add_series: Add, opened: Open
) -> None:
    add_series("shifted", offset_mm=3.1)
    series = add_series("its own")
    assert segmented_series(opened(), without_references(series)) == series.uid


def test_segmentation_without_references_that_fits_two_series_is_refused_by_their_names(
    add_series: Add, opened: Open
) -> None:
    first, second = add_series("first"), add_series("as the first")
    assert first.uid != second.uid
    with pytest.raises(LabelError, match=r"refers to no series.*lies on the voxels of: ") as refused:
        segmented_series(opened(), without_references(first))
    assert first.uid in str(refused.value)
    assert second.uid in str(refused.value)


def test_segmentation_without_references_of_nothing_here_is_refused(add_series: Add, opened: Open) -> None:
    seg = without_references(add_series("one"))
    seg.FrameOfReferenceUID = "1.2.3"
    with pytest.raises(LabelError, match=r"frame of reference 1\.2\.3 it lies on the voxels of: none"):
        segmented_series(opened(), seg)
    seg.FrameOfReferenceUID = ""
    with pytest.raises(LabelError, match=r"frame of reference \(none\)"):
        segmented_series(opened(), seg)
