"""Finds labelled cases, and reads a case in the form that the training transforms expect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import Transform

from lib.configs.preset import Preset
from lib.errors import ImageError, LabelError, TrainingError
from lib.transforms.channel_search import find_channel_sources
from lib.transforms.channels import ChannelSources, files_of, missing_channels, read_channels
from lib.transforms.inputs import read_input
from lib.transforms.preprocess import IMAGE, LABEL, as_meta_tensor, volume_tensor
from lib.transforms.volume import NIFTI_SUFFIXES, NRRD_SUFFIXES, Volume, check_segmentable, least_apart_mm, read_volume

logger = logging.getLogger(__name__)

MISSING = "missing"
PREDICTED = "predicted"


@dataclass(frozen=True)
class Case:
    """An image with its label.

    Attributes:
        case_id: the image's id.
        image: file of the image.
        label: file of the label.
        values: maps label values of the file to those of the preset, for files with other numbers; values that are not
            listed become background. None: the file uses the preset's own numbers.
        channels: channel name to file, for a case of several sequences without a source record next to ``image``;
            ``image`` is the file of the display channel.
        missing: values of preset labels that the mask does not annotate: their voxels may be background in the mask.
        predicted: values of preset labels whose voxels in the mask are a model's prediction, and not a person's.
    """

    case_id: str
    image: Path
    label: Path
    values: Mapping[int, int] | None = None
    missing: tuple[int, ...] = ()
    channels: Mapping[str, Path] = field(default_factory=dict, hash=False)
    predicted: tuple[int, ...] = ()

    def as_item(self) -> dict[str, Any]:
        """Plain data for a MONAI dataset. It includes the files' sizes and times, so that caches notice a new label."""
        channels = {name: str(path) for name, path in self.channels.items()}
        read = [*files_of(self.image), self.label, *self.channels.values()]
        stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in read]
        values = None if self.values is None else sorted(self.values.items())
        paths = {"image": str(self.image), "label": str(self.label)}
        missing = list(self.missing)
        item = {"id": self.case_id, "stamps": stamps, "values": values, "missing": missing, **paths}
        predicted = {PREDICTED: list(self.predicted)} if self.predicted else {}
        return {"case": item | ({"channels": channels} if channels else {}) | predicted}


CaseReader = Callable[[Case, Preset], tuple[Volume, npt.NDArray[np.uint8]]]
"""Reads a case like :func:`read_case`."""


def find_cases(images: Path, labels: Path, values: Mapping[int, int] | None = None) -> list[Case]:
    """Pair the NIfTI files of two folders by name; images without a label are left out.

    Raises:
        TrainingError: if a folder is missing, or if there is no pair.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise TrainingError(f"there is no folder {str(folder)!r}")
    by_id = {case_id(path): path for path in sorted(labels.iterdir()) if path.name.endswith(NIFTI_SUFFIXES)}
    cases = [
        Case(case_id(path), path, by_id[case_id(path)], values)
        for path in sorted(images.iterdir())
        if path.name.endswith(NIFTI_SUFFIXES) and case_id(path) in by_id
    ]
    if not cases:
        raise TrainingError(f"no image in {str(images)!r} has a label of the same name in {str(labels)!r}")
    return cases


def find_channel_cases(
    images: Path, labels: Path, preset: Preset, values: Mapping[int, int] | None = None
) -> list[Case]:
    """Pair the cases of several sequences in a folder with their labels.

    Cases without a label are left out, and so are those that lack a required channel.

    Raises:
        TrainingError: if a folder is missing, or if there is no pair; the error then names what the cases lack.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise TrainingError(f"there is no folder {str(folder)!r}")
    by_id = {case_id(path): path for path in sorted(labels.iterdir()) if path.name.endswith(NIFTI_SUFFIXES)}
    display = preset.channels[preset.display_channel].name
    sources = [one for one in find_channel_sources(images, preset) if one.case_id in by_id]
    lacking = [f"{one.case_id} {one.problem}" for one in sources if one.problem]
    lacking += [f"{one.case_id} lacks {', '.join(one.missing)}" for one in sources if one.missing and not one.problem]
    for sentence in lacking:
        logger.warning("left out: %s", sentence)
    cases = [
        Case(one.case_id, one.files[display], by_id[one.case_id], values, channels=one.files)
        for one in sources
        if not one.missing and not one.problem
    ]
    if not cases:
        why = f" ({'; '.join(lacking[:5])})" if lacking else ""
        raise TrainingError(f"no case in {str(images)!r} has all channels and a label in {str(labels)!r}{why}")
    return cases


def case_id(path: Path) -> str:
    """File name without the suffix of an image file; the name of a DICOM folder is unchanged."""
    suffix = next((s for s in (*NIFTI_SUFFIXES, *NRRD_SUFFIXES) if path.name.endswith(s)), "")
    return path.name.removesuffix(suffix)


def read_case(case: Case, preset: Preset) -> tuple[Volume, npt.NDArray[np.uint8]]:
    """Read a case, and check that its label matches the image and the preset.

    Returns:
        The image, and its label in the preset's values, shape (X, Y, Z).

    Raises:
        ImageError: if the image cannot be used.
        LabelError: if the label has another grid, is not integer-valued, or has values that the preset lacks.
    """
    volume = read_image(case, preset)
    check_segmentable(volume, preset, case.case_id)
    try:
        label = read_volume(case.label)
    except ImageError as error:
        raise LabelError(f"label of {case.case_id!r}: {error}") from error
    check_same_grid(label, volume, case.case_id)
    return volume, to_preset_values(label.voxels, preset, case.values, case.case_id)


def read_image(case: Case, preset: Preset) -> Volume:
    """Read the image of a case, with all channels if the preset has several.

    Raises:
        ImageError: if it cannot be used, or lacks a required channel.
    """
    if not preset.channels or not case.channels:
        return read_input(case.image, preset)
    missing = missing_channels(case.channels, preset)
    return read_channels(ChannelSources(case.case_id, case.channels, missing), preset)


def check_same_grid(label: Volume, image: Volume, name: str) -> None:
    """Refuse a label that does not have its image's voxel grid.

    Raises:
        LabelError: naming the difference.
    """
    if label.voxels.shape != image.voxels.shape:
        raise LabelError(f"label of {name!r} has shape {label.voxels.shape}; valid: its image's {image.voxels.shape}")
    apart = least_apart_mm(label.grid, image.grid)
    if apart > image.grid.tolerance_mm:
        raise LabelError(f"label of {name!r} lies up to {apart:.3g} mm away from its image: their affines differ")


def to_preset_values(
    voxels: npt.NDArray[np.float32], preset: Preset, values: Mapping[int, int] | None, name: str
) -> npt.NDArray[np.uint8]:
    """Map a label file's voxels to the preset's values.

    Raises:
        LabelError: for values that are not integers, or that the preset does not have.
    """
    present = np.unique(voxels)
    bad = present[~(np.isfinite(present) & (present == np.rint(present)) & (present >= 0))]
    if bad.size:
        raise LabelError(f"label of {name!r} has values that are no whole numbers from 0, such as {bad[0]:g}")
    allowed = {label.index: label.index for label in preset.labels} if values is None else dict(values)
    unknown = [int(value) for value in present if value and int(value) not in allowed]
    if unknown and values is None:
        raise LabelError(f"label of {name!r} has the values {unknown[:8]}; valid: {preset.label_indices} and 0")
    table = np.zeros(max((0, *allowed)) + 2, dtype=np.uint8)  # the last entry is for all values that are not listed
    for value, index in allowed.items():
        if value > 0:
            table[value] = index
    return table[np.minimum(voxels, len(table) - 1).astype(np.int64)]


class ReadCased(Transform):
    """Reads the plain data of :meth:`Case.as_item` into MetaTensors ``image`` and ``label`` of shape (1, X, Y, Z).

    The entries ``missing`` and ``predicted``, of shape (classes,), are true for classes that the label does not
    annotate, and for those that a model has predicted.

    Args:
        preset: the preset.
        read: reads a case.
    """

    def __init__(self, preset: Preset, read: CaseReader | None = None) -> None:
        self._preset, self._read = preset, read or read_case

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = data["case"]
        values = None if item["values"] is None else dict(item["values"])
        channels = {name: Path(path) for name, path in item.get("channels", {}).items()}
        case = Case(item["id"], Path(item["image"]), Path(item["label"]), values, channels=channels)
        volume, label = self._read(case, self._preset)
        missing, predicted = torch.zeros(2, self._preset.out_channels, dtype=torch.bool)
        missing[item[MISSING]] = True
        predicted[item.get(PREDICTED, [])] = True
        return {
            MISSING: missing,
            PREDICTED: predicted,
            "case": item["id"],
            IMAGE: volume_tensor(volume),
            LABEL: as_meta_tensor(label, volume.affine_ras),
        }
