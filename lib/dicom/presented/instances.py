"""The instances of a series that presents a file: generated on demand, and never written to disk."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

from lib.dicom.presented.grid import SeriesGrid
from lib.dicom.presented.upright import UprightGrid
from lib.dicom.series import Frame, Series

NAMESPACE = uuid.UUID("8f4f0a1e-7a0e-5d5b-9e55-0b0c6d6f2c11")
SOP_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage}
LARGEST_STORED = 65_535
SHORTEST_WINDOW = 1.0


def uid_of(case_id: str, what: str) -> str:
    """A UID that is derived from a case's id (PS3.5, B.2) and is the same on every machine.

    Args:
        case_id: the image's id.
        what: ``study``, ``series``, ``frame``, or ``instance 7``.
    """
    return f"2.25.{uuid.uuid5(NAMESPACE, f'{what}/{case_id}').int}"


def rescale(lowest: float, highest: float, whole: bool) -> tuple[float, float]:
    """Slope and intercept with which 16 unsigned bits represent a range; exact for whole numbers that fit."""
    if whole and highest - lowest <= LARGEST_STORED:
        return 1.0, lowest
    slope = float(f"{(highest - lowest) / (LARGEST_STORED - 1):.9e}") or 1.0
    return slope, float(f"{lowest:.9e}")


def store(plane: npt.NDArray[np.float32], slope: float, intercept: float) -> npt.NDArray[np.uint16]:
    """Stored values for Pixel Data; one plane at a time, so that no float64 copy of the whole image is made."""
    values = (plane.astype(np.float64) - intercept) / slope
    stored: npt.NDArray[np.uint16] = np.clip(np.rint(values), 0, LARGEST_STORED).astype(np.uint16)
    return stored


def name_of(case_id: str) -> str:
    """A case's id as a person name, with a caret for the missing given name (PS3.5, 6.2.1)."""
    return case_id.replace("^", " ").replace("=", " ").replace("\\", " ")[:63] + "^"


def describe_case(case_id: str, modality: str) -> Dataset:
    """The attributes that all instances of a case share, determined without opening its file."""
    described = Dataset()
    described.SpecificCharacterSet = "ISO_IR 192"
    described.PatientID = described.StudyDescription = case_id.replace("\\", " ")[:64]
    described.PatientName = name_of(case_id)
    described.PatientBirthDate = described.PatientSex = described.StudyDate = described.StudyTime = ""
    described.AccessionNumber = described.ReferringPhysicianName = described.StudyID = ""
    described.StudyInstanceUID = uid_of(case_id, "study")
    described.SeriesInstanceUID = uid_of(case_id, "series")
    described.FrameOfReferenceUID = uid_of(case_id, "frame")
    described.PositionReferenceIndicator = ""
    described.Modality, described.SeriesNumber, described.SeriesDescription = modality, 1, "from a file"
    described.SOPClassUID = SOP_CLASSES.get(modality, MRImageStorage)
    return described


def describe_series(
    described: Dataset, grid: SeriesGrid | UprightGrid, window: tuple[float, float], scale: tuple[float, float]
) -> Dataset:
    """What is the same in all instances of a series, known once its file has been opened.

    Args:
        described: attributes that are known without the file.
        grid: grid of the series.
        window: window centre and width.
        scale: rescale slope and intercept.
    """
    series = Dataset()
    series.update(described)
    modality = str(described.Modality)
    spacing = np.linalg.norm(grid.affine_lps[:3, :3], axis=0)
    directions = grid.affine_lps[:3, :3] / spacing
    series.ImageType = ["DERIVED", "SECONDARY", "AXIAL"] if modality == "CT" else ["DERIVED", "SECONDARY", "OTHER"]
    series.Columns, series.Rows = grid.shape[0], grid.shape[1]
    series.ImageOrientationPatient = _decimals(np.concatenate([directions[:, 0], directions[:, 1]]))
    series.PixelSpacing = _decimals(spacing[[1, 0]])
    series.SliceThickness = series.SpacingBetweenSlices = _decimals(spacing[2:])[0]
    series.SamplesPerPixel, series.PhotometricInterpretation = 1, "MONOCHROME2"
    series.BitsAllocated = series.BitsStored = 16
    series.HighBit, series.PixelRepresentation = 15, 0
    series.RescaleSlope, series.RescaleIntercept = _decimals(np.array(scale))
    series.RescaleType = "HU" if modality == "CT" else "US"
    series.WindowCenter, series.WindowWidth = _decimals(np.array([window[0], max(window[1], SHORTEST_WINDOW)]))
    return series


def make_header(series: Dataset, uid: str, grid: SeriesGrid | UprightGrid, number: int) -> FileDataset:
    """An instance without its pixels. It refers to the elements of ``series``, which must not be modified.

    Args:
        series: attributes that all instances of the series share, from :func:`describe_series`.
        uid: SOP Instance UID.
        grid: grid of the series.
        number: index of the slice, from 0.
    """
    header = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    header.update(series)
    header.is_little_endian, header.is_implicit_VR = True, False
    header.SOPInstanceUID = uid
    header.InstanceNumber = number + 1
    header.ImagePositionPatient = _decimals(grid.affine_lps[:3, :3] @ [0, 0, number] + grid.affine_lps[:3, 3])
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return header


def own_elements(header: Dataset, series: Dataset) -> Dataset:
    """What an instance has beside what is the same in all of its series."""
    own = Dataset()
    own.update({tag: header[tag] for tag in header.keys() - series.keys()})
    return own


def as_series(headers: list[FileDataset], file: Path) -> Series:
    """The series of these headers, for reading and writing a DICOM SEG."""
    return Series(tuple(_frame(header, file) for header in headers))


def _frame(header: FileDataset, file: Path) -> Frame:
    orientation = np.array(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
    rows, columns = (float(value) for value in header.PixelSpacing)
    position = np.array(header.ImagePositionPatient, dtype=float)
    scale = float(header.RescaleSlope), float(header.RescaleIntercept)
    return Frame(header, file, 0, position, orientation, (rows, columns), *scale)


def _decimals(values: npt.NDArray[np.float64]) -> list[str]:
    """Decimal strings of at most 16 characters (PS3.5, 6.2), with the highest possible precision."""
    return [_decimal(float(value)) for value in values]


def _decimal(value: float) -> str:
    for digits in range(16, 5, -1):
        text = f"{value:.{digits}g}"
        if len(text) <= 16:
            return text
    return f"{value:.5g}"
