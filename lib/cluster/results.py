"""Stored masks and their records, by which an interrupted run resumes."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.configs.preset import Preset
from lib.infers.writer import write_mask
from lib.storage.files import replacing
from lib.storage.full_disk import writing
from lib.storage.json_files import read_json, write_json
from lib.transforms.volume import Affine

RECORDS_FOLDER = "records"
SECONDS_BEFORE_LEFT_OVER = 600.0
"""Age at which the partial files of killed workers are removed."""


@dataclass(frozen=True)
class CaseResult:
    """The record of a finished case.

    Attributes:
        image_sha256: checksum of the segmented image.
        version: version of the model; ``weights_sha256`` identifies its file.
        seconds: computing time, without reading and writing.
        volumes_ml: volume of each label; 0 for a label without voxels.
        estimated_dice: None if the weights have no calibration, or if the mask is empty.
        engine: engine of the windows, ``pytorch`` or ``openvino``, whose results may differ in single voxels.
        image_stamp: value by which a PACS series is recognised without its files; empty for files.
        label_names: name to value in the mask.
        sent_to: where the mask was uploaded, and with which tag.
        warnings: warnings for the user on the image and its sequences, one sentence each.
    """

    case: str
    image_sha256: str
    model: str
    version: str
    weights_sha256: str
    mask: str
    seconds: float
    volumes_ml: dict[str, float]
    estimated_dice: float | None = None
    engine: str = ""
    image_stamp: str = ""
    sent_to: str = ""
    label_names: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Masked:
    """A finished case whose mask, a ``.nii.gz``, is not stored yet."""

    result: CaseResult
    mask: bytes


def measure_ml(labels: npt.NDArray[np.uint8], affine_ras: Affine, preset: Preset) -> dict[str, float]:
    """Volume of each label in millilitres."""
    voxel_ml = abs(float(np.linalg.det(affine_ras[:3, :3]))) / 1000
    counts = np.bincount(labels.ravel(), minlength=256)
    return {name: round(float(counts[index]) * voxel_ml, 3) for name, index in preset.label_indices.items()}


def packed_mask(labels: npt.NDArray[np.uint8], affine_ras: Affine, preset: Preset) -> bytes:
    """A mask of shape (X, Y, Z) as ``.nii.gz``."""
    written = write_mask(labels, affine_ras, preset, ".nii.gz", "uint8", True)
    try:
        return written.read_bytes()
    finally:
        written.unlink(missing_ok=True)


class ResultFolder:
    """Masks ``<case>.nii.gz``, and their records in ``records``; a record is written after its mask.

    Args:
        folder: the folder, which is created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing(f"the folder {str(folder)!r}"):
            (folder / RECORDS_FOLDER).mkdir(parents=True, exist_ok=True)
            for path in [*folder.glob(".*.tmp"), *(folder / RECORDS_FOLDER).glob(".*.tmp")]:
                with suppress(FileNotFoundError):  # another worker may write it, or remove it, at the same time
                    if time.time() - path.stat().st_mtime > SECONDS_BEFORE_LEFT_OVER:
                        path.unlink()

    def find(self, case: str, model: str, weights_sha256: str) -> CaseResult | None:
        """The result of a case, if it is of these weights and its mask exists; it states its image itself."""
        try:
            kept = CaseResult(**read_json(self._record(case)))
        except (OSError, ValueError, TypeError):
            return None  # there is none or it is damaged: the case is computed again
        same = (kept.model, kept.weights_sha256) == (model, weights_sha256)
        return kept if same and (self.folder / kept.mask).is_file() else None

    def keep(self, masked: Masked) -> CaseResult:
        """Write mask and record, each atomically.

        Raises:
            StorageError: if they cannot be written.
        """
        result = masked.result
        with writing(f"the mask of {result.case!r}"):
            with replacing(self.folder / result.mask) as file:
                file.write(masked.mask)
            write_json(self._record(result.case), asdict(result))
        return result

    def record(self, result: CaseResult) -> None:
        """Write a record again.

        Raises:
            StorageError: if it cannot be written.
        """
        with writing(f"the record of {result.case!r}"):
            write_json(self._record(result.case), asdict(result))

    def _record(self, case: str) -> Path:
        return self.folder / RECORDS_FOLDER / f"{case}.json"
