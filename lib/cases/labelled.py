"""Labelled cases: finding them, and reading one as what the training chain takes."""

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


@dataclass(frozen=True)
class Case:
    """An image with its label.

    Attributes:
        case_id: the image's id.
        image: its file.
        label: its label's file.
        values: label value in the file to label value of the preset, for files that number them otherwise; values
            that are not named become background. None: the file uses the preset's own numbers.
        channels: channel name to file, of a case of several sequences whose files are not written down beside
            ``image``, which is the display channel's.
        missing: values of the preset's labels that the mask does not speak of: what is background in it may be theirs.
    """

    case_id: str
    image: Path
    label: Path
    values: Mapping[int, int] | None = None
    missing: tuple[int, ...] = ()
    channels: Mapping[str, Path] = field(default_factory=dict, hash=False)

    def as_item(self) -> dict[str, Any]:
        """Plain data for a MONAI dataset. The files' sizes and times are in it, so that caches notice a new label."""
        channels = {name: str(path) for name, path in self.channels.items()}
        read = [*files_of(self.image), self.label, *self.channels.values()]
        stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in read]
        values = None if self.values is None else sorted(self.values.items())
        paths = {"image": str(self.image), "label": str(self.label)}
        missing = list(self.missing)
        item = {"id": self.case_id, "stamps": stamps, "values": values, "missing": missing, **paths}
        return {"case": item | ({"channels": channels} if channels else {})}


CaseReader = Callable[[Case, Preset], tuple[Volume, npt.NDArray[np.uint8]]]
"""Reads a case as :func:`read_case` does."""


def find_cases(images: Path, labels: Path, values: Mapping[int, int] | None = None) -> list[Case]:
    """Pair the NIfTI files of two folders by name; images without a label are left out.

    Raises:
        TrainingError: when there is no such folder, or no pair.
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
        TrainingError: when there is no such folder, or no pair; then it names what cases lack.
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
    """File name without the suffix of an image; a DICOM folder's name as it is."""
    suffix = next((s for s in (*NIFTI_SUFFIXES, *NRRD_SUFFIXES) if path.name.endswith(s)), "")
    return path.name.removesuffix(suffix)


def read_case(case: Case, preset: Preset) -> tuple[Volume, npt.NDArray[np.uint8]]:
    """Read a case and check that the label belongs to the image and to the preset.

    Returns:
        The image, and its label in the preset's values, shape (X, Y, Z).

    Raises:
        ImageError: when the image cannot be used.
        LabelError: when the label is on another grid, not integer-valued, or has values that the preset lacks.
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
    """Read the image of a case, with all its channels where the preset has some.

    Raises:
        ImageError: when it cannot be used, or lacks a required channel.
    """
    if not preset.channels or not case.channels:
        return read_input(case.image, preset)
    missing = missing_channels(case.channels, preset)
    return read_channels(ChannelSources(case.case_id, case.channels, missing), preset)


def check_same_grid(label: Volume, image: Volume, name: str) -> None:
    """Refuse a label that is not on its image's voxel grid.

    Raises:
        LabelError: naming what differs.
    """
    if label.voxels.shape != image.voxels.shape:
        raise LabelError(f"label of {name!r} has shape {label.voxels.shape}; valid: its image's {image.voxels.shape}")
    apart = least_apart_mm(label.grid, image.grid)
    if apart > image.grid.tolerance_mm:
        raise LabelError(f"label of {name!r} lies up to {apart:.3g} mm away from its image: their affines differ")


def to_preset_values(
    voxels: npt.NDArray[np.float32], preset: Preset, values: Mapping[int, int] | None, name: str
) -> npt.NDArray[np.uint8]:
    """Turn a label file's voxels into the preset's values.

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
    table = np.zeros(max((0, *allowed)) + 2, dtype=np.uint8)  # its last entry is for all values that nobody named
    for value, index in allowed.items():
        if value > 0:
            table[value] = index
    return table[np.minimum(voxels, len(table) - 1).astype(np.int64)]


class ReadCased(Transform):
    """Turns the plain data of :meth:`Case.as_item` into ``image`` and ``label`` MetaTensors of shape (1, X, Y, Z).

    ``missing`` is true for the classes that the label does not speak of; shape (classes,).

    Args:
        preset: the task.
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
        missing = torch.zeros(self._preset.out_channels, dtype=torch.bool)
        missing[item["missing"]] = True
        return {
            MISSING: missing,
            "case": item["id"],
            IMAGE: volume_tensor(volume),
            LABEL: as_meta_tensor(label, volume.affine_ras),
        }
