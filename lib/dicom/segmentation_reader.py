"""Reads a DICOM Segmentation of any program onto the grid of its source series.

Segments are identified by their labels, and frames by their position in the patient; the order of both is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from lib.dicom.files import reading
from lib.dicom.series import UNEVEN, Series
from lib.errors import LabelError

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
GRID_TOLERANCE_VOXELS = 0.1


@dataclass(frozen=True)
class SegmentedVolume:
    """A mask and its names.

    Attributes:
        labels: shape (columns, rows, slices) of the series; the segment number of each voxel, 0 for none.
        names: segment number to segment label, for all described segments, with or without voxels.
    """

    labels: npt.NDArray[np.uint8]
    names: Mapping[int, str]


def is_segmentation(instance: Dataset) -> bool:
    """Whether an instance is a SEG."""
    return str(instance.get("SOPClassUID", "")) in (SEGMENTATION, LABEL_MAP)


def referenced_series(seg: Dataset) -> str:
    """Series Instance UID of the segmented series; "" if it is not stated."""
    references = seg.get("ReferencedSeriesSequence") or []
    return str(references[0].get("SeriesInstanceUID", "")) if references else ""


def referenced_instances(seg: Dataset) -> set[str]:
    """SOP Instance UIDs of the referenced source images."""
    uids = set()
    for reference in seg.get("ReferencedSeriesSequence") or []:
        for item in reference.get("ReferencedInstanceSequence") or []:
            uids.add(str(item.get("ReferencedSOPInstanceUID", "")))
    for groups in (
        *(seg.get("PerFrameFunctionalGroupsSequence") or []),
        *(seg.get("SharedFunctionalGroupsSequence") or []),
    ):
        for derivation in groups.get("DerivationImageSequence") or []:
            for item in derivation.get("SourceImageSequence") or []:
                uids.add(str(item.get("ReferencedSOPInstanceUID", "")))
    return uids - {""}


def read_segmentation(seg: Dataset, series: Series) -> SegmentedVolume:
    """Read the frames of a SEG onto the grid of its series.

    Args:
        seg: the instance, including its pixels.
        series: the segmented series.

    Raises:
        LabelError: if it is not a SEG, has another frame of reference or grid, or has overlapping segments.
    """
    if not is_segmentation(seg):
        raise LabelError("this instance is no DICOM Segmentation")
    if series.even:
        raise LabelError(f"series {series.uid} {UNEVEN}")
    with reading(f"DICOM SEG {seg.get('SOPInstanceUID', '')} cannot be read", LabelError):
        return _read(seg, series)


def _read(seg: Dataset, series: Series) -> SegmentedVolume:
    names = {int(item.SegmentNumber): str(item.get("SegmentLabel", "")).strip() for item in seg.SegmentSequence}
    if max(names, default=0) > 255:
        raise LabelError(f"DICOM SEG has the segment number {max(names)}; valid: 1 to 255")
    _check_frame_of_reference(seg, series)
    frames = _frames(seg)
    labels = np.zeros(series.shape, dtype=np.uint8)
    to_index = np.linalg.inv(series.affine_lps)
    for number, (pixels, place) in enumerate(zip(frames, _places(seg), strict=True)):
        if not pixels.any():
            continue
        at = _indices(to_index @ place, pixels.shape, series, number)
        segment = _segment_of(seg, number)
        values = pixels.T if segment is None else np.uint8(segment) * pixels.T
        before = labels[at]
        if ((before != 0) & (values != 0) & (before != values)).any():
            _refuse_overlap(before, values, names)
        labels[at] = np.maximum(before, values)
    return SegmentedVolume(labels, names)


def _check_frame_of_reference(seg: Dataset, series: Series) -> None:
    own, other = str(series.header.get("FrameOfReferenceUID", "")), str(seg.get("FrameOfReferenceUID", ""))
    if own and other and own != other:
        raise LabelError(f"DICOM SEG lies in the frame of reference {other}; valid: its series' {own}")


def _frames(seg: Dataset) -> npt.NDArray[np.uint8]:
    """Pixels of all frames, shape (frames, rows, columns): 0 and 1, or segment numbers of a label map."""
    pixels = seg.pixel_array
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if str(seg.get("SegmentationType", "BINARY")) == "FRACTIONAL":
        pixels = 2 * pixels.astype(np.int64) >= int(seg.MaximumFractionalValue)
    return pixels.astype(np.uint8)


def _segment_of(seg: Dataset, frame: int) -> int | None:
    """The segment number of a frame; None for a label map, whose pixels are segment numbers."""
    if str(seg.get("SegmentationType", "")) == "LABELMAP":
        return None
    group = _group(seg, frame, "SegmentIdentificationSequence")
    return int(group.ReferencedSegmentNumber)


def _places(seg: Dataset) -> list[npt.NDArray[np.float64]]:
    """For each frame, the 4x3 matrix from (column, row, 1) to millimetres in LPS."""
    places = []
    for frame in range(int(seg.NumberOfFrames)):
        orientation = np.array(_group(seg, frame, "PlaneOrientationSequence").ImageOrientationPatient, dtype=float)
        between_rows, between_columns = map(float, _group(seg, frame, "PixelMeasuresSequence").PixelSpacing)
        place = np.zeros((4, 3))
        place[:3, 0] = orientation[:3] * between_columns
        place[:3, 1] = orientation[3:] * between_rows
        place[:3, 2] = np.array(_group(seg, frame, "PlanePositionSequence").ImagePositionPatient, dtype=float)
        place[3, 2] = 1
        places.append(place)
    return places


def _group(seg: Dataset, frame: int, keyword: str) -> Dataset:
    """A functional group of a frame, or the shared one of all frames.

    Raises:
        AttributeError: if there is none.
    """
    own = seg.PerFrameFunctionalGroupsSequence[frame]
    shared = seg.get("SharedFunctionalGroupsSequence") or [Dataset()]
    items: Sequence[Dataset] | None = own.get(keyword) or shared[0].get(keyword)
    if not items:
        raise AttributeError(f"frame {frame + 1} has no {keyword}")
    return items[0]


def _indices(
    to_index: npt.NDArray[np.float64], shape: tuple[int, ...], series: Series, frame: int
) -> tuple[npt.NDArray[np.intp], ...]:
    """The voxel indices in the series for the pixels (columns, rows) of a frame, for any orientation.

    Raises:
        LabelError: if they do not coincide with its voxels.
    """
    rows, columns = shape
    steps = np.rint(to_index[:3]).astype(np.intp)
    corners = np.array([[c, r, 1] for c in (0, columns - 1) for r in (0, rows - 1)]).T
    # frames lie at the positions of the slices, which may deviate slightly from the fitted grid
    edge_mm = float(np.linalg.norm(series.affine_lps[:3, :3], axis=0).min())
    tolerance_voxels = GRID_TOLERANCE_VOXELS + float(series.distances_mm.max()) / edge_mm
    if np.abs(to_index[:3] @ corners - steps @ corners).max() > tolerance_voxels:
        raise LabelError(f"frame {frame + 1} of the DICOM SEG is not on the voxel grid of series {series.uid}")
    at = steps @ corners
    if at.min() < 0 or (at.max(axis=1) >= series.shape).any():
        raise LabelError(f"frame {frame + 1} of the DICOM SEG reaches out of series {series.uid}")
    column, row = np.arange(columns)[:, None], np.arange(rows)[None, :]
    return tuple(steps[axis, 0] * column + steps[axis, 1] * row + steps[axis, 2] for axis in range(3))


def _refuse_overlap(before: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8], names: Mapping[int, str]) -> None:
    both = (before != 0) & (values != 0) & (before != values)
    first, second = int(before[both][0]), int(values[both][0])
    raise LabelError(
        f"the segments {names.get(first, first)!r} and {names.get(second, second)!r} overlap, in one slice by "
        f"{int(both.sum())} voxels; valid: each voxel in one segment at most"
    )
