"""DICOM series of synthetic volumes, in any plane and transfer syntax."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gdcm
import numpy as np
import pytest
from dicom_series import Plane, SeriesIdentity, write_series
from pydicom import dcmread
from pydicom.dataset import FileMetaDataset
from torso_phantom import grid_affine

SHAPE = (24, 19, 11)
UPRIGHT = grid_affine(SHAPE, (0.8, 0.9, 2.5), "LPS")
OBLIQUE = grid_affine(SHAPE, (0.8, 0.9, 2.5), "LPS", (17, -9, 23), (3.5, -60.25, 110.125))
AFFINES = {"axial": UPRIGHT, "sagittal": UPRIGHT, "coronal": UPRIGHT, "oblique": OBLIQUE}
PLANES: dict[str, Plane] = {"axial": "axial", "sagittal": "sagittal", "coronal": "coronal", "oblique": "axial"}


def draw_volume(modality: str = "CT") -> np.ndarray:
    """Noise, shape SHAPE: any mistake in order or place shows."""
    random = np.random.default_rng(11)
    return random.integers(-1000, 2000, SHAPE).astype(np.int16) if modality == "CT" else random.integers(0, 900, SHAPE)


def draw_mask(shape: tuple[int, ...], labels: int = 2, seed: int = 5) -> np.ndarray:
    """Noise of labels, with a slice and a corner that are empty."""
    random = np.random.default_rng(seed)
    mask = random.integers(0, labels + 1, shape).astype(np.uint8)
    mask[:, :, 3] = 0
    mask[:5, :5] = 0
    return mask


@pytest.fixture
def make_series(tmp_path: Path) -> Callable[..., list[Path]]:
    """Write a series: ``make_series("oblique", "MR")``; returns its files."""

    def make(plane: str = "axial", modality: str = "CT", name: str = "series", patient: str = "SYNTH-7") -> list[Path]:
        identity = SeriesIdentity(patient, modality, name)
        return write_series(tmp_path / name, draw_volume(modality), AFFINES[plane], identity, PLANES[plane])

    return make


def edit(file: Path, **attributes: object) -> None:
    """Change attributes of a file in place; None removes one."""
    dataset = dcmread(file)
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    if "SOPInstanceUID" in attributes:
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(file)


def transcode(file: Path, syntax: int) -> None:
    """Compress a file in place with GDCM."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(file))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(file))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def strip_preamble(file: Path) -> None:
    """Leave the data set alone, without preamble and file meta information, as old archives keep it."""
    dataset = dcmread(file)
    dataset.file_meta, dataset.preamble = FileMetaDataset(), None
    dataset.save_as(file, write_like_original=True)
