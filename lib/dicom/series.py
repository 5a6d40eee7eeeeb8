"""A DICOM series as one volume: which frames belong to it, their order and position, and what was left out.

Frames are sorted along the normal of their planes (PS3.3, C.7.6.2.1.1), as in ITK, so that columns, rows and slices
form a right-handed system. Classic series (one file for each slice) and enhanced multi-frame images (one file with many
frames) are treated alike from here on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from lib.dicom.files import describe, read_instance, reading
from lib.dicom.pixels import decode_file
from lib.dicom.spacing import EvenSlices, even_slices
from lib.errors import ImageError
from lib.imagefiles.reading import check_memory

FloatArray = npt.NDArray[np.float64]
TOLERANCE_MM = 0.1
"""Largest distance of a slice's voxels from the grid that is fitted to all slices."""
TOLERANCE_OF_DISTANCE = 0.1
"""The same limit relative to the slice distance, which is smaller for slices thinner than 1 mm."""
MIN_NORMAL, MAX_NORMAL = 0.99, 1.01
"""Valid length of the cross product of row and column direction, which are orthogonal unit vectors."""
ROUNDING_MM = 1e-3
"""Rounding error of decimal strings; smaller distances are not reported."""
SAME_STACK_MM = 1.0
"""Largest difference of the corners of two slices, relative to their first voxels, with which both belong to one
stack.
"""
UNEVEN = (
    "has unevenly spaced slices, and its mask lies on even ones; valid: a DICOM SEG of the regular series that is "
    "shown beside it, or another kind of file"
)
"""Why a DICOM SEG cannot refer to the slices of a resampled series."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Frame:
    """One plane of a series.

    Attributes:
        header: attributes of its instance, without pixels.
        file: file of its instance.
        number: index among the frames of the instance, from 0.
        position_mm: position of the centre of the first voxel, in LPS.
        orientation: directions of rows and columns, in LPS; shape (2, 3).
        spacing_mm: distance between rows, and between columns.
        slope: Rescale Slope.
        intercept: Rescale Intercept.
    """

    header: Dataset
    file: Path
    number: int
    position_mm: FloatArray
    orientation: FloatArray
    spacing_mm: tuple[float, float]
    slope: float
    intercept: float

    @property
    def uid(self) -> str:
        """SOP Instance UID of its instance; the file name if it is empty."""
        return str(self.header.get("SOPInstanceUID", "")) or self.file.name

    @property
    def is_localizer(self) -> bool:
        """Whether the header declares it as a localizer."""
        return "LOCALIZER" in [str(value).upper() for value in self.header.get("ImageType") or []]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return int(self.header.Rows), int(self.header.Columns)

    @property
    def corners_mm(self) -> FloatArray:
        """Centres of the four corner voxels, in LPS; shape (4, 3)."""
        rows, columns = self.size
        along_row, along_column = (
            self.orientation[0] * self.spacing_mm[1] * (columns - 1),
            self.orientation[1] * self.spacing_mm[0] * (rows - 1),
        )
        corners: FloatArray = np.array([0 * along_row, along_row, along_column, along_row + along_column])
        corners += self.position_mm
        return corners

    def is_parallel_to(self, other: Frame) -> bool:
        """Whether both frames have the same size and orientation, whatever their position."""
        offsets = (self.corners_mm - self.position_mm) - (other.corners_mm - other.position_mm)
        return self.size == other.size and float(np.linalg.norm(offsets, axis=1).max()) <= SAME_STACK_MM


@dataclass(frozen=True)
class Series:
    """One volume.

    Attributes:
        frames: frames sorted along the normal of the planes.
        notes: what was left out or resampled, one sentence each.
        even: the slices of the resampled volume, if the frames are unevenly spaced.

    Raises:
        ImageError: for fewer than two frames.
    """

    frames: tuple[Frame, ...]
    notes: tuple[str, ...] = ()
    even: EvenSlices | None = None

    def __post_init__(self) -> None:
        if len(self.frames) < 2:
            raise ImageError(f"a DICOM series of {len(self.frames)} slice is no volume; valid: at least 2 slices")

    @property
    def header(self) -> Dataset:
        """The header of the first slice, for attributes that all slices share."""
        return self.frames[0].header

    @property
    def uid(self) -> str:
        """Series Instance UID."""
        return str(self.header.get("SeriesInstanceUID", ""))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        return int(self.header.Columns), int(self.header.Rows), self.even.count if self.even else len(self.frames)

    @property
    def positions_mm(self) -> FloatArray:
        """Positions of the first voxels of the frames, in LPS; shape (frames, 3)."""
        return np.array([frame.position_mm for frame in self.frames])

    @cached_property
    def affine_lps(self) -> FloatArray:
        """4x4, from (column, row, slice) to millimetres in LPS; the slice step is fitted by least squares."""
        first, count = self.frames[0], len(self.frames)
        affine = np.eye(4)
        affine[:3, 0] = first.orientation[0] * first.spacing_mm[1]
        affine[:3, 1] = first.orientation[1] * first.spacing_mm[0]
        if self.even:
            affine[:3, 2], affine[:3, 3] = self.even.step_mm, self.even.first_mm
            return affine
        positions = self.positions_mm
        numbers = np.arange(count) - (count - 1) / 2
        affine[:3, 2] = numbers @ positions / (numbers @ numbers)
        affine[:3, 3] = positions.mean(axis=0) + affine[:3, 2] * numbers[0]
        return affine

    @cached_property
    def distances_mm(self) -> FloatArray:
        """Distance of the farthest corner of each frame from its position on the fitted grid."""
        places = self.even.places if self.even else np.arange(len(self.frames), dtype=np.float64)
        rows, columns = self.frames[0].size
        corners = np.array([[0, 0], [columns - 1, 0], [0, rows - 1], [columns - 1, rows - 1]])
        on_grid = corners @ self.affine_lps[:3, :2].T + self.affine_lps[:3, 3]
        apart = [
            f.corners_mm - (on_grid + at * self.affine_lps[:3, 2]) for at, f in zip(places, self.frames, strict=True)
        ]
        distances: FloatArray = np.linalg.norm(apart, axis=2).max(axis=1)
        return distances

    @property
    def tolerance_mm(self) -> float:
        """Largest distance of a slice from the fitted grid."""
        return tolerance_mm(float(np.linalg.norm(self.affine_lps[:3, 2])))

    @property
    def affine_ras(self) -> FloatArray:
        """4x4, from (column, row, slice) to millimetres in RAS."""
        affine: FloatArray = LPS_TO_RAS @ self.affine_lps
        return affine

    @property
    def sources(self) -> list[Dataset]:
        """The headers of its instances without repetition, in the order of the slices."""
        return list({frame.uid: frame.header for frame in self.frames}.values())

    def read_voxels(self) -> npt.NDArray[np.float32]:
        """Decode, rescale, and resample if the frames are unevenly spaced; shape (columns, rows, slices).

        Raises:
            MemoryBudgetError: if the headers announce more voxels than fit into memory.
            ImageError: naming the instance that cannot be decoded.
        """
        check_memory((*self.shape[:2], len(self.frames)), 0, f"series of {self.frames[0].uid}")
        voxels = np.empty((*self.shape[:2], len(self.frames)), dtype=np.float32)
        places: dict[Path, list[int]] = defaultdict(list)
        for index, frame in enumerate(self.frames):
            places[frame.file].append(index)
        for file, indices in places.items():
            pixels = decode_file(file, self.frames[indices[0]].uid)
            for index in indices:
                frame = self.frames[index]
                if pixels.shape[0] <= frame.number or pixels.shape[1:] != voxels.shape[1::-1]:
                    raise ImageError(f"instance {frame.uid} has pixels of shape {pixels.shape}, unlike its header")
                voxels[:, :, index] = pixels[frame.number].T * frame.slope + frame.intercept
        return self.even.resample(voxels) if self.even else voxels


def read_series(files: Iterable[Path], name: str = "the selection", uid: str = "") -> Series:
    """Read and sort the frames of one series.

    Args:
        files: its instances, in any order.
        name: name of the files in errors.
        uid: UID to use, if it is not the Series Instance UID of the files.

    Raises:
        ImageError: if there is no image among them, they belong to several series, a slice is missing, slices have
            equal positions, or one lies farther from an even grid than the tolerance.
    """
    headers, notes = _read_headers(files)
    ordered = order_series(headers, notes, name)
    if uid:
        for _, header in headers:
            header.SeriesInstanceUID = uid
    return ordered


def order_series(headers: Sequence[tuple[Path, Dataset]], notes: list[str], name: str) -> Series:
    """Like :func:`read_series`, for headers that have been read, each with its file.

    Raises:
        ImageError: see :func:`read_series`; also for a header with values of the wrong number or type.
    """
    with reading(f"{name} cannot be put in order"):
        return _ordered(headers, notes, name)


def _ordered(headers: Sequence[tuple[Path, Dataset]], notes: list[str], name: str) -> Series:
    series = sorted({str(header.get("SeriesInstanceUID", "")) for _, header in headers})
    if len(series) != 1:
        raise ImageError(f"{name} holds {len(series) or 'no'} DICOM series; valid: one")
    frames = [frame for file, header in _slices(headers, notes) for frame in _frames_of(file, header)]
    frames = _one_stack(_without_localizers(frames, notes), notes, name)
    made = Series(tuple(_one_a_place(_in_order(frames), notes, name)))
    if made.distances_mm.max() > made.tolerance_mm:
        made = _resampled(made, name)
    return Series(made.frames, (*notes, *_spacing_notes(made)), made.even)


def tolerance_mm(between_slices_mm: float) -> float:
    """Largest distance of a slice from an even grid.

    >>> tolerance_mm(2.5), tolerance_mm(0.5)
    (0.1, 0.05)
    """
    return min(TOLERANCE_MM, TOLERANCE_OF_DISTANCE * between_slices_mm)


def _read_headers(files: Iterable[Path]) -> tuple[list[tuple[Path, Dataset]], list[str]]:
    """Headers of the images without repetition, and what was left out."""
    headers: dict[str, tuple[Path, Dataset]] = {}
    notes = []
    for file in files:
        try:
            with reading("it cannot be read"):
                header = read_instance(file, with_pixels=False)
        except ImageError as error:
            notes.append(f"file {file.name!r} left out, which is no DICOM: {describe(error)}")
            continue
        uid = str(header.get("SOPInstanceUID", "")) or file.name
        if uid in headers:
            notes.append(f"instance {uid} left out, which is there twice")
        elif "Rows" in header and "Columns" in header:
            headers[uid] = file, header
        else:
            notes.append(f"instance {uid} left out, which is no image")
    return list(headers.values()), notes


def _slices(headers: Sequence[tuple[Path, Dataset]], notes: list[str]) -> list[tuple[Path, Dataset]]:
    """The instances without screenshots, which are in colour, or have no position and another size or kind.

    Raises:
        ImageError: if all are in colour.
    """
    grey = [entry for entry in headers if int(entry[1].get("SamplesPerPixel") or 1) == 1]
    if headers and not grey:
        uid, samples = headers[0][1].get("SOPInstanceUID", ""), headers[0][1].SamplesPerPixel
        raise ImageError(f"instance {uid} has {samples} values a pixel; valid: one (no colours)")
    placed = {_kind(header) for _, header in grey if _has_place(header)}
    kept = [(file, header) for file, header in grey if _has_place(header) or _kind(header) in placed or not placed]
    there = {id(header) for _, header in kept}
    for file, header in headers:
        if id(header) not in there:
            what = "in colours" if int(header.get("SamplesPerPixel") or 1) > 1 else "a screenshot without a place"
            notes.append(f"instance {header.get('SOPInstanceUID', '') or file.name} left out, which is {what}")
    return kept


def _has_place(header: Dataset) -> bool:
    return bool(header.get("ImagePositionPatient")) or "PerFrameFunctionalGroupsSequence" in header


def _kind(header: Dataset) -> tuple[Any, ...]:
    return str(header.get("SOPClassUID", "")), header.get("Rows"), header.get("Columns")


def _frames_of(file: Path, header: Dataset) -> list[Frame]:
    """The frames of one instance.

    Raises:
        ImageError: naming the instance, if its header does not state its position.
    """
    uid = str(header.get("SOPInstanceUID", file.name))
    with reading(f"instance {uid} does not say where it lies"):
        if "PerFrameFunctionalGroupsSequence" not in header:
            return [_frame(file, header, 0, header, header, header, header)]
        shared = header.SharedFunctionalGroupsSequence[0] if header.get("SharedFunctionalGroupsSequence") else Dataset()
        return [
            _frame(file, header, number, *(_group(keyword, groups, shared) for keyword in FUNCTIONAL_GROUPS))
            for number, groups in enumerate(header.PerFrameFunctionalGroupsSequence)
        ]


FUNCTIONAL_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)


def _group(keyword: str, of_frame: Dataset, shared: Dataset) -> Dataset:
    """A functional group (PS3.3, C.7.6.16) of a frame, or of all frames; empty if there is none."""
    items = of_frame.get(keyword) or shared.get(keyword)
    return items[0] if items else Dataset()


def _frame(
    file: Path, header: Dataset, number: int, place: Dataset, plane: Dataset, measures: Dataset, rescale: Dataset
) -> Frame:
    """One frame from the groups of attributes that describe it.

    Raises:
        AttributeError, TypeError, ValueError: for a header that lacks a value, or has a value that is not a number.
    """
    position = np.array(place.ImagePositionPatient, dtype=np.float64)
    orientation = np.array(plane.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    rows, columns = (float(value) for value in measures.PixelSpacing)
    if position.shape != (3,) or not np.isfinite([*position, *orientation.ravel(), rows, columns]).all():
        raise ValueError("Image Position, Orientation and Pixel Spacing must be finite numbers")
    if min(rows, columns) <= 0 or not MIN_NORMAL <= np.linalg.norm(np.cross(*orientation)) <= MAX_NORMAL:
        raise ValueError("Pixel Spacing must be above 0, and the directions of a row and a column at a right angle")
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    return Frame(
        header,
        file,
        number,
        position,
        orientation,
        (rows, columns),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _without_localizers(frames: Sequence[Frame], notes: list[str]) -> list[Frame]:
    localizers = [frame for frame in frames if frame.is_localizer]
    if len(localizers) == len(frames):
        return list(frames)  # there is nothing else; its geometry shows whether it is a volume
    notes += [f"instance {frame.uid} left out, which is a localizer" for frame in localizers]
    return [frame for frame in frames if not frame.is_localizer]


def _one_stack(frames: Sequence[Frame], notes: list[str], name: str) -> list[Frame]:
    """The frames of the largest stack of equal size and orientation.

    Raises:
        ImageError: if no stack has more than half of the frames.
    """
    stacks: list[list[Frame]] = []
    for frame in frames:
        own = next((stack for stack in stacks if frame.is_parallel_to(stack[0])), None)
        if own is None:
            stacks.append([frame])
        else:
            own.append(frame)
    kept = max(stacks, key=len)
    if 2 * len(kept) <= len(frames):
        raise ImageError(f"{name} holds {len(stacks)} stacks of different size or orientation; valid: one")
    there = {id(frame) for frame in kept}
    notes += [f"instance {f.uid} left out, of another size or orientation" for f in frames if id(f) not in there]
    return kept


def _in_order(frames: Sequence[Frame]) -> list[Frame]:
    """Slices sorted along the normal of their plane, and at equal positions by Instance Number."""
    normal = np.cross(*frames[0].orientation)
    return sorted(frames, key=lambda f: (float(normal @ f.position_mm), int(f.header.get("InstanceNumber") or 0)))


def _one_a_place(frames: Sequence[Frame], notes: list[str], name: str) -> list[Frame]:
    """Leave out slices at the position of another slice.

    Raises:
        ImageError: if every position has several: phases, echoes or a time series, which are several volumes.
    """
    normal = np.cross(*frames[0].orientation)
    steps_mm = np.diff([float(normal @ frame.position_mm) for frame in frames])
    apart = steps_mm[steps_mm > ROUNDING_MM]
    same_place_mm = max(ROUNDING_MM, tolerance_mm(float(np.median(apart))) if len(apart) else 0.0)
    kept, doubled = [frames[0]], []
    for frame in frames[1:]:
        if normal @ (frame.position_mm - kept[-1].position_mm) < same_place_mm:
            doubled.append(frame)
        else:
            kept.append(frame)
    if 2 * len(doubled) >= len(kept):
        volumes = len(frames) / len(kept)
        raise ImageError(
            f"{name} has {len(frames)} slices at {len(kept)} places, about {volumes:.3g} volumes (phases, echoes "
            "or times); valid: one volume a series"
        )
    notes += [f"instance {frame.uid} left out, which lies where another slice does" for frame in doubled]
    return kept


def _resampled(series: Series, name: str) -> Series:
    """A series with even slices, for one whose slices are unevenly spaced along a straight line.

    Raises:
        ImageError: if a slice is missing or does not lie on the line, naming the slices next to the largest gap, or the
            most distant slice.
    """
    frames = series.frames
    normal = np.cross(*frames[0].orientation)
    even = even_slices(series.positions_mm, normal / np.linalg.norm(normal))
    made = Series(frames, even=even) if even else series
    if even and made.distances_mm.max() <= made.tolerance_mm:
        return made
    farthest = int(np.argmax(made.distances_mm))
    steps_mm = np.linalg.norm(np.diff(series.positions_mm, axis=0), axis=1)
    at = int(np.argmax(np.abs(steps_mm - np.median(steps_mm))))
    raise ImageError(
        f"the slices of {name} are {steps_mm.min():.4g} to {steps_mm.max():.4g} mm apart, most of all between "
        f"instances {frames[at].uid} and {frames[at + 1].uid}, and instance {frames[farthest].uid} lies "
        f"{made.distances_mm[farthest]:.3g} mm from an even grid; valid: evenly spaced slices, none missing, at most "
        f"{made.tolerance_mm:.3g} mm from their grid"
    )


def _spacing_notes(series: Series) -> list[str]:
    """A note on the deviation of slices from their grid, or on the resampling."""
    notes = []
    if series.even:
        apart = np.linalg.norm(np.diff(series.positions_mm, axis=0), axis=1)
        step = float(np.linalg.norm(series.even.step_mm))
        notes.append(
            f"its {len(series.frames)} slices, {apart.min():.4g} to {apart.max():.4g} mm apart, were resampled to "
            f"{series.even.count} slices that are {step:.4g} mm apart and lie up to {series.even.farthest_mm:.2g} mm "
            "from the nearest of them"
        )
    farthest = float(series.distances_mm.max())
    if farthest > ROUNDING_MM:
        notes.append(f"slices lie up to {farthest:.2g} mm from an even grid (tolerance {series.tolerance_mm:.2g} mm)")
    return notes
