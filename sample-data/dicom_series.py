"""Writes volumes as classic DICOM series of people who do not exist, one file a slice.

    >>> from dicom_series import SeriesIdentity, write_series
    >>> identity = SeriesIdentity("SYNTH-0001", "MR", "T1 hippocampus")
    >>> files = write_series(folder, image, affine_ras, identity, plane="coronal")  # doctest: +SKIP

Voxels are never resampled: a plane is a choice of the volume's own axes, so a slice is as oblique as the affine is.
Attributes follow PS3.3 A.3 (CT Image Storage) and A.4 (MR Image Storage).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

Plane = Literal["axial", "sagittal", "coronal"]
Affine = npt.NDArray[np.float64]

AXIS_CODES = {"axial": "LPS", "sagittal": "PIR", "coronal": "LIP"}
"""Where columns, rows and slices lead to: right-handed, so that slices follow the normal, as readers sort them."""
PLANES = tuple(AXIS_CODES)
SOP_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage}
PATIENT_PREFIX = "SYNTH-"
CT_INTERCEPT_HU = -1024
MR_STORED_MAXIMUM = 4095
DATE, TIME = "20000101", "120000"
ORTHOGONALITY_TOLERANCE = 1e-4
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class SeriesIdentity:
    """Whom and what a series claims to show.

    Attributes:
        patient_id: begins with ``SYNTH-``, so that nobody takes it for a patient's; at most 64 characters.
        modality: ``MR`` or ``CT``.
        description: the series' description; at most 64 characters.
        seed: a patient of another seed is another patient: study and frame of reference differ.
        body_part: a defined term of PS3.16 annex L.

    Raises:
        ValueError: for any other value.
    """

    patient_id: str
    modality: Literal["MR", "CT"]
    description: str
    seed: int = 0
    body_part: str = "HEAD"

    def __post_init__(self) -> None:
        if not self.patient_id.startswith(PATIENT_PREFIX) or len(self.patient_id) > 64 or "\\" in self.patient_id:
            raise ValueError(
                f"patient_id {self.patient_id!r} must begin with {PATIENT_PREFIX!r}, and have at most 64 characters "
                "and no backslash"
            )
        if self.modality not in SOP_CLASSES:
            raise ValueError(f"modality {self.modality!r} must be one of {sorted(SOP_CLASSES)}")
        if len(self.description) > 64 or "\\" in self.description:
            raise ValueError(f"description {self.description!r} must have at most 64 characters and no backslash")


@dataclass(frozen=True)
class SlicedVolume:
    """Stored values whose last axis leads along the normal of the slices.

    Attributes:
        stored: shape (columns, rows, slices), uint16.
        affine_lps: 4x4, indices to millimetres in LPS; orthogonal axes.

    Raises:
        ValueError: for sheared axes, which a classic series cannot say, and for anything but a 3D uint16 array.
    """

    stored: npt.NDArray[np.uint16]
    affine_lps: Affine

    def __post_init__(self) -> None:
        if self.stored.ndim != 3 or 0 in self.stored.shape or self.stored.dtype != np.uint16:
            raise ValueError(f"stored must be 3D and uint16, and is {self.stored.dtype} of shape {self.stored.shape}")
        if not np.allclose(self.directions.T @ self.directions, np.eye(3), atol=ORTHOGONALITY_TOLERANCE):
            raise ValueError(f"affine must have orthogonal axes; their directions are {self.directions.tolist()}")

    @property
    def spacing_mm(self) -> npt.NDArray[np.float64]:
        """Between columns, rows and slices."""
        spacing: npt.NDArray[np.float64] = np.linalg.norm(self.affine_lps[:3, :3], axis=0)
        return spacing

    @property
    def directions(self) -> npt.NDArray[np.float64]:
        """Unit vectors in columns: towards the next column, row and slice."""
        directions: npt.NDArray[np.float64] = self.affine_lps[:3, :3] / np.maximum(self.spacing_mm, 1e-12)
        return directions

    def position_mm(self, index: int) -> npt.NDArray[np.float64]:
        """Centre of a slice's first voxel, in LPS."""
        position: npt.NDArray[np.float64] = self.affine_lps[:3, 3] + index * self.affine_lps[:3, 2]
        return position


def write_series(
    folder: Path,
    volume: npt.NDArray[np.generic],
    affine_ras: Affine,
    identity: SeriesIdentity,
    plane: Plane = "axial",
) -> list[Path]:
    """Write one file a slice, ``0001.dcm`` and on; the folder appears when all are in it.

    Args:
        folder: must not exist yet.
        volume: shape (X, Y, Z). CT: Hounsfield units, -1024 to 64511, rounded. MR: integers from 0 to 65535 are kept,
            anything else is scaled to 0 to 4095 (an MR's units are arbitrary).
        affine_ras: 4x4, indices to millimetres in RAS; orthogonal axes.
        identity: patient, modality and description.
        plane: the axes of the volume that lie nearest to this plane become rows and columns.

    Raises:
        FileExistsError: when the folder is there already.
        ValueError: for values that do not fit, an unknown plane or an affine with shear.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; a series is written into a folder of its own")
    sliced = slice_volume(stored_values(volume, identity.modality), affine_ras, plane)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    common = _common_attributes(sliced, identity)
    names = [f"{index + 1:04d}.dcm" for index in range(sliced.stored.shape[2])]
    try:
        for index, name in enumerate(names):
            _slice_dataset(sliced, index, common).save_as(partial / name, write_like_original=False)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in names]


def is_complete_series(folder: Path, identity: SeriesIdentity) -> bool:
    """Whether the folder holds a series of this identity, with as many slices as the first one says there are."""
    files = sorted(folder.glob("*.dcm"))
    try:
        first = dcmread(files[0], stop_before_pixels=True)
        found = (str(first.StudyInstanceUID), str(first.SeriesDescription), int(first.ImagesInAcquisition))
    except (IndexError, InvalidDicomError, AttributeError, OSError):
        return False
    return found == (_uid("study", identity), identity.description, len(files))


def slice_volume(stored: npt.NDArray[np.uint16], affine_ras: Affine, plane: Plane) -> SlicedVolume:
    """Reorder axes so that columns, rows and slices are the plane's.

    Raises:
        ValueError: for an unknown plane or an affine with shear.
    """
    if plane not in AXIS_CODES:
        raise ValueError(f"plane {plane!r} must be one of {sorted(AXIS_CODES)}")
    if stored.ndim != 3:
        raise ValueError(f"volume must be 3D, and has shape {stored.shape}")
    wanted = nib.orientations.axcodes2ornt(tuple(AXIS_CODES[plane]))
    change = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine_ras), wanted)
    reordered = nib.orientations.apply_orientation(stored, change)
    affine = affine_ras @ nib.orientations.inv_ornt_aff(change, stored.shape)
    return SlicedVolume(reordered, RAS_TO_LPS @ affine)


def stored_values(volume: npt.NDArray[np.generic], modality: str) -> npt.NDArray[np.uint16]:
    """The unsigned 16-bit numbers that are written for a volume.

    Raises:
        ValueError: for values that are not finite, or CT values outside of what the rescale can say.
    """
    if not np.isfinite(volume).all():
        raise ValueError("volume must have finite values only")
    if modality == "CT":
        shifted = np.rint(volume).astype(np.int32) - CT_INTERCEPT_HU
        if shifted.size and (shifted.min() < 0 or shifted.max() > 65535):
            raise ValueError(
                f"CT values must lie from {CT_INTERCEPT_HU} to {65535 + CT_INTERCEPT_HU} HU, and lie from "
                f"{volume.min()} to {volume.max()}"
            )
        return shifted.astype(np.uint16)
    if np.issubdtype(volume.dtype, np.integer) and volume.size and volume.min() >= 0 and volume.max() <= 65535:
        return volume.astype(np.uint16)
    values = volume.astype(np.float64)
    span = np.ptp(values) or 1.0
    scaled: npt.NDArray[np.uint16] = np.rint((values - values.min()) / span * MR_STORED_MAXIMUM).astype(np.uint16)
    return scaled


def _common_attributes(sliced: SlicedVolume, identity: SeriesIdentity) -> Dataset:
    """All that is the same in every slice."""
    attributes = Dataset()
    for group in (
        _patient_and_study(identity),
        _series(sliced, identity),
        _equipment(identity),
        _image_plane(sliced),
        _pixel_description(sliced, identity),
    ):
        for keyword, value in group.items():
            setattr(attributes, keyword, value)
    return attributes


def _patient_and_study(identity: SeriesIdentity) -> dict[str, object]:
    return {
        "PatientName": f"{identity.patient_id}^Synthetic",
        "PatientID": identity.patient_id,
        "PatientBirthDate": "",
        "PatientSex": "",
        "PatientComments": "Synthetic data: this person does not exist",
        "StudyInstanceUID": _uid("study", identity),
        "StudyDate": DATE,
        "StudyTime": TIME,
        "StudyID": str(identity.seed)[:16],
        "StudyDescription": f"Synthetic {identity.modality}",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
    }


def _series(sliced: SlicedVolume, identity: SeriesIdentity) -> dict[str, object]:
    # Other voxels or another place are another series: a viewer may keep what it has seen under a UID
    content = hashlib.sha256(sliced.stored.tobytes() + sliced.affine_lps.round(6).tobytes()).hexdigest()
    return {
        "SeriesInstanceUID": _uid("series", identity, content),
        "SeriesNumber": 1,
        "SeriesDate": DATE,
        "SeriesTime": TIME,
        "SeriesDescription": identity.description,
        "Modality": identity.modality,
        "BodyPartExamined": identity.body_part,
        "PatientPosition": "HFS",
        "FrameOfReferenceUID": _uid("frame of reference", identity),
        "PositionReferenceIndicator": "",
        "ImagesInAcquisition": sliced.stored.shape[2],
    }


def _equipment(identity: SeriesIdentity) -> dict[str, object]:
    common: dict[str, object] = {
        "Manufacturer": "Synthetic data generator",
        "ManufacturerModelName": "monailabel-unetr sample-data",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL" if identity.modality == "CT" else "OTHER"],
        "AcquisitionNumber": 1,
    }
    if identity.modality == "CT":
        return {**common, "KVP": 120}
    # Type 1 and 2 attributes of the MR Image module: a T1-weighted 3D gradient echo
    mr: dict[str, object] = {"ScanningSequence": "GR", "SequenceVariant": "SP", "ScanOptions": "", "FlipAngle": 8}
    return {**common, **mr, "MRAcquisitionType": "3D", "RepetitionTime": 9.5, "EchoTime": 4.6, "EchoTrainLength": 1}


def _image_plane(sliced: SlicedVolume) -> dict[str, object]:
    between_columns, between_rows, between_slices = sliced.spacing_mm
    return {
        "ImageOrientationPatient": _decimals([*sliced.directions[:, 0], *sliced.directions[:, 1]]),
        # Rows first: PS3.3 10.7.1.3
        "PixelSpacing": _decimals([between_rows, between_columns]),
        "SliceThickness": _decimals([between_slices])[0],
        "SpacingBetweenSlices": _decimals([between_slices])[0],
    }


def _pixel_description(sliced: SlicedVolume, identity: SeriesIdentity) -> dict[str, object]:
    description: dict[str, object] = {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Columns": sliced.stored.shape[0],
        "Rows": sliced.stored.shape[1],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "BurnedInAnnotation": "NO",
        "LossyImageCompression": "00",
    }
    if identity.modality == "CT":
        rescale = {"RescaleIntercept": CT_INTERCEPT_HU, "RescaleSlope": 1, "RescaleType": "HU"}
        return {**description, **rescale, "WindowCenter": 40, "WindowWidth": 400}
    low, high = np.percentile(sliced.stored, (0.5, 99.5))
    return {**description, **{"WindowCenter": round((low + high) / 2), "WindowWidth": max(2, round(high - low))}}


def _slice_dataset(sliced: SlicedVolume, index: int, common: Dataset) -> FileDataset:
    """One slice as a file that is yet to be saved."""
    modality, series = str(common.Modality), str(common.SeriesInstanceUID)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SOP_CLASSES[modality]
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[f"{series}|", str(index)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", dict(common.items()), file_meta=meta, preamble=b"\0" * 128)
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.InstanceNumber = index + 1
    position = sliced.position_mm(index)
    dataset.ImagePositionPatient = _decimals(position)
    dataset.SliceLocation = _decimals([position @ sliced.directions[:, 2]])[0]
    # Pixels run along a row first, so rows come first in the array
    dataset.PixelData = np.ascontiguousarray(sliced.stored[:, :, index].T, dtype="<u2").tobytes()
    return dataset


def _uid(kind: str, identity: SeriesIdentity, content: str = "") -> str:
    # Joined without separators by pydicom, so each part brings its own
    parts = ["monailabel-unetr synthetic", kind, identity.patient_id, identity.modality, str(identity.seed), content]
    return str(generate_uid(entropy_srcs=[f"{part}|" for part in parts]))


def _decimals(values: object) -> list[DSfloat]:
    """Numbers in as many digits as a decimal string has room for (16 characters)."""
    return [DSfloat(float(value), auto_format=True) for value in np.ravel(np.asarray(values, dtype=np.float64))]
