"""Masks and what is known of them, kept so that a run that was interrupted goes on where it ended."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.configs.preset import Preset
from lib.infers.segmenter import Segmentation
from lib.infers.writer import write_mask
from lib.storage.files import replacing
from lib.storage.full_disk import writing
from lib.storage.json_files import write_json
from lib.transforms.volume import Affine

RECORDS_FOLDER = "records"


@dataclass(frozen=True)
class CaseResult:
    """What is known of a finished case.

    Attributes:
        image_sha256: checksum of the image that was segmented.
        version: of the model; ``weights_sha256`` says which file that was.
        seconds: of computing, without reading and writing.
        volumes_ml: by label; 0 where the label was not found.
        estimated_dice: None where the weights have no calibration, or nothing was found.
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


def measure_ml(labels: npt.NDArray[np.uint8], affine_ras: Affine, preset: Preset) -> dict[str, float]:
    """Volume of each label in millilitres."""
    voxel_ml = abs(float(np.linalg.det(affine_ras[:3, :3]))) / 1000
    counts = np.bincount(labels.ravel(), minlength=256)
    return {name: round(float(counts[index]) * voxel_ml, 3) for name, index in preset.label_indices.items()}


class ResultFolder:
    """Masks ``<case>.nii.gz``, and a record of each in ``records``, which is written after its mask.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing(f"the folder {str(folder)!r}"):
            (folder / RECORDS_FOLDER).mkdir(parents=True, exist_ok=True)

    def find(self, case: str, image_sha256: str, model: str, weights_sha256: str) -> CaseResult | None:
        """The result of a case, where it is of this very image and of these weights, and its mask is there."""
        try:
            found = CaseResult(**json.loads(self._record(case).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # none, or a damaged one: the case is computed again
        same = (found.image_sha256, found.model, found.weights_sha256) == (image_sha256, model, weights_sha256)
        return found if same and (self.folder / found.mask).is_file() else None

    def keep(self, result: CaseResult, found: Segmentation, affine_ras: Affine, preset: Preset) -> None:
        """Write mask and record, each as a whole or not at all.

        Raises:
            StorageError: when the disk does not take them.
        """
        with writing(f"the mask of {result.case!r}"):
            written = write_mask(found.labels, affine_ras, preset, ".nii.gz", "uint8", True)
            target = self.folder / result.mask
            try:
                with replacing(target) as file, written.open("rb") as mask:
                    shutil.copyfileobj(mask, file)
            finally:
                written.unlink(missing_ok=True)
            write_json(self._record(result.case), asdict(result))

    def _record(self, case: str) -> Path:
        return self.folder / RECORDS_FOLDER / f"{case}.json"
