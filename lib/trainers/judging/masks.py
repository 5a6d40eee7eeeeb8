"""A model's masks of cases, each computed once and shared by training, gate and report."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lib.cases.labelled import Case, read_image
from lib.configs.preset import Preset
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.models.calibration import foreground_uncertainty
from lib.networks.checkpoint import Checkpoint
from lib.storage.files import replacing, sha256_of_blocks
from lib.transforms.channels import files_of
from lib.transforms.volume import Volume

logger = logging.getLogger("unetr.evaluate")

LabelArray = npt.NDArray[np.uint8]

MASKS_FOLDER = "masks"
SEGMENTATION = 2
"""Raised with each change of how the same network's masks come about, so that masks of before are computed again."""


@dataclass(frozen=True)
class CaseMask:
    """Labels on the image's own grid, shape (X, Y, Z), and the model's uncertainty (0 to 1)."""

    labels: LabelArray
    uncertainty: float = math.nan


class CaseMasks:
    """The masks of one model.

    Args:
        segmenter: the model.
        folder: folder of the stored masks; without one, each mask is computed on every request.
    """

    def __init__(self, segmenter: Segmenter, folder: Path | None = None) -> None:
        self._segmenter, self.folder = segmenter, folder

    @classmethod
    def of_weights(
        cls, checkpoint: Checkpoint, preset: Preset, device: torch.device, planner: Planner, folder: Path
    ) -> CaseMasks:
        """The masks of these weights, stored in a separate folder within ``folder``.

        Raises:
            CheckpointError: if the weights do not match.
        """
        segmenter = Segmenter.from_checkpoint(checkpoint, preset, device, planner=planner)
        return cls(segmenter, folder / digest_of_weights(checkpoint.model))

    @property
    def preset(self) -> Preset:
        """The preset."""
        return self._segmenter.preset

    def of(self, case: Case, volume: Volume | None = None) -> CaseMask:
        """The mask of a case.

        Args:
            case: the case.
            volume: its image, if it has been read already.

        Raises:
            InputError: if the image cannot be read or segmented.
        """
        file = None if self.folder is None else self.folder / f"{self._key(case)}.npz"
        kept = None if file is None else _read(file)
        if kept is not None:
            return kept
        image = read_image(case, self.preset) if volume is None else volume
        segmentation = self._segmenter.segment(image, name=case.case_id, entropy=True)
        assert segmentation.entropy is not None
        mask = CaseMask(segmentation.labels, foreground_uncertainty(segmentation.entropy, segmentation.labels))
        if file is not None:
            _write(file, mask)
        return mask

    def _key(self, case: Case) -> str:
        """A value that changes with the image's files and with the segmentation settings; the label has no effect."""
        files = [*files_of(case.image), *case.channels.values()]
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        where = self._segmenter.device.type, str(self._segmenter.dtype)
        task = self.preset.model_dump_json(exclude={"training"})
        return hashlib.sha256(repr((SEGMENTATION, case.case_id, stamps, where, task)).encode()).hexdigest()


def digest_of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and values, in hexadecimal."""
    return sha256_of_blocks(
        block
        for name, value in sorted(weights.items())
        for block in (
            f"{name} {value.dtype} {tuple(value.shape)} ".encode(),
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    )


def prune_masks(folder: Path, keep: Collection[str]) -> None:
    """Remove stored masks, except those of some weights.

    Args:
        folder: folder with one subfolder for each set of weights.
        keep: digests of the weights whose masks are kept.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _read(file: Path) -> CaseMask | None:
    """A stored mask; None if there is none, or if it is damaged, which is logged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            return CaseMask(kept["labels"], float(kept["uncertainty"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is computed anew: %s", file.name, error)
        return None


def _write(file: Path, mask: CaseMask) -> None:
    """Store a mask; on a full disk it is not stored, and has to be computed again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez_compressed(stream, labels=mask.labels, uncertainty=mask.uncertainty)
    except OSError as error:
        logger.warning("a mask could not be kept, and is computed again when it is needed: %s", error)
