"""Regular series that are offered next to series that can be segmented but that viewers cannot show."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset

from lib.dicom.attributes import STUDY_ATTRIBUTES, TYPE_2, Json, first_value, tag_of, to_json
from lib.dicom.files import reading
from lib.dicom.presented.instances import SOP_CLASSES, uid_of
from lib.dicom.presented.upright import UprightGrid
from lib.dicom.series import order_series
from lib.errors import ImageError

MODALITIES = frozenset(SOP_CLASSES)
GEOMETRY = tuple(
    map(
        tag_of,
        (
            *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "InstanceNumber", "ImageType", "Rows", "Columns"),
            *("SamplesPerPixel", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "NumberOfFrames"),
            *("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"),
        ),
    )
)
COPIED = (*STUDY_ATTRIBUTES, *map(tag_of, ("FrameOfReferenceUID", "BodyPartExamined", "SeriesDate", "SeriesTime")))
LONGEST_DESCRIPTION = 64
AFTER_THE_SOURCES = 1_000
"""Added to the Series Number, so that viewers list regular series after the original ones."""

MOST_GROWTH = 4
"""Largest ratio of the voxel counts of an upright series and its source; a larger one indicates a wrong position."""
LARGEST_NUMBER = 2**31 - 1 - AFTER_THE_SOURCES


@dataclass(frozen=True)
class Regular:
    """A regular series that is offered next to one that viewers cannot show.

    Attributes:
        slices: number of its slices.
        why: how it differs from the original series, in a few words.
    """

    slices: int
    why: str


def regular_for(metadata: Iterable[Json], summary: Json) -> Regular | None:
    """The regular series for a series; None if viewers can show the series, and if it is not a volume.

    Args:
        metadata: DICOM JSON of the instances of the series.
        summary: input of :func:`describe_regular`; a series that it cannot describe has no regular series.
    """
    notes: list[str] = []
    try:
        with reading("the geometry cannot be read"):
            to_json(describe_regular(summary, "1", ""))
            series = order_series(
                [_geometry(number, instance) for number, instance in enumerate(metadata)], notes, "the series"
            )
            grid = UprightGrid.of(series.shape, series.affine_ras)
    except ImageError:
        return None  # the problem is reported when it is opened
    if not 0 < math.prod(grid.shape) <= MOST_GROWTH * math.prod(series.shape):
        return None
    left_out = sum("left out" in note for note in series.notes)
    why = [
        *(["upright"] if grid.is_tilted else []),
        *(["resampled"] if series.even else []),
        *([f"{left_out} left out"] if left_out else []),
    ]
    return Regular(series.shape[2], ", ".join(why)) if why else None


def describe_regular(source: Json, uid: str, why: str) -> Dataset:
    """The attributes that all instances of a regular series share, determined without reading source files.

    Args:
        source: DICOM JSON of an instance of the source, or its summary.
        uid: the source's Series Instance UID.
        why: see :class:`Regular`.
    """
    described = Dataset.from_json({tag: source[tag] for tag in COPIED if tag in source})
    described.SpecificCharacterSet = "ISO_IR 192"
    described.StudyInstanceUID = first_value(source, "StudyInstanceUID")
    described.SeriesInstanceUID = uid_of(uid, "regular series")
    described.Modality = first_value(source, "Modality")
    described.SOPClassUID = SOP_CLASSES[described.Modality]
    described.SeriesNumber = AFTER_THE_SOURCES + _number(first_value(source, "SeriesNumber"))
    added = f" (regular: {why})"
    described.SeriesDescription = first_value(source, "SeriesDescription")[: LONGEST_DESCRIPTION - len(added)] + added
    described.DerivationDescription = f"Shown for viewers that need upright, even slices: {why}; made of series {uid}"
    if "FrameOfReferenceUID" not in described:
        described.FrameOfReferenceUID = uid_of(uid, "regular frame")
    described.PositionReferenceIndicator = ""
    for keyword in TYPE_2:
        if keyword not in described:
            setattr(described, keyword, "")
    return described


def _geometry(number: int, metadata: Json) -> tuple[Path, Dataset]:
    return Path(f"instance-{number}"), Dataset.from_json({tag: metadata[tag] for tag in GEOMETRY if tag in metadata})


def _number(text: str) -> int:
    try:
        return min(max(0, int(text)), LARGEST_NUMBER)
    except ValueError:
        return 0
