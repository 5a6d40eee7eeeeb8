"""A DICOM series as one volume: which frames belong to it, in which order, where, and what was left out.

Frames are put in order along the normal of their planes (PS3.3, C.7.6.2.1.1), as ITK does, so that columns, rows and
slices are right-handed. Classic series (one file a slice) and enhanced multi-frame images (one file, many frames) are
the same from here on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from lib.errors import ImageError

FloatArray = npt.NDArray[np.float64]
MAX_UNEVEN_SHARE = 0.1
"""How far apart neighbouring slices may be from their usual distance, as a share of it."""
SAME_PLACE_MM = 1e-3
SAME_DIRECTION = 1e-4
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

# What pydicom's decoders raise for pixels that are no pixels depends on which of them it was.
DECODING_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    OSError,
    EOFError,
)


@dataclass(frozen=True)
class Frame:
    """One plane of a series.

    Attributes:
        header: its instance, without pixels.
        file: where its instance lies.
        number: its place among the frames of the instance, from 0.
        position_mm: centre of the first voxel, in LPS.
        orientation: direction of a row and of a column, in LPS; shape (2, 3).
        spacing_mm: between rows, between columns.
        slope: of the rescale.
        intercept: of the rescale.
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
        """SOP Instance UID of its instance; the file's name where that is empty."""
        return str(self.header.get("SOPInstanceUID", "")) or self.file.name

    @property
    def is_localizer(self) -> bool:
        """Whether it says itself that it is an overview for planning."""
        return "LOCALIZER" in [str(value).upper() for value in self.header.get("ImageType") or []]

    @property
    def grid(self) -> tuple[Any, ...]:
        """What all slices of one volume have in common."""
        directions = np.rint(self.orientation.ravel() / SAME_DIRECTION / 10).astype(int).tolist()
        spacing = [round(value, 4) for value in self.spacing_mm]
        return int(self.header.Rows), int(self.header.Columns), *spacing, *directions


@dataclass(frozen=True)
class Series:
    """One volume.

    Attributes:
        frames: in order along the normal of the planes.
        notes: what was left out, one sentence each.

    Raises:
        ImageError: for fewer than two frames.
    """

    frames: tuple[Frame, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.frames) < 2:
            raise ImageError(f"a DICOM series of {len(self.frames)} slice is no volume; valid: at least 2 slices")

    @property
    def header(self) -> Dataset:
        """The first slice's instance, for what all have in common."""
        return self.frames[0].header

    @property
    def uid(self) -> str:
        """Series Instance UID."""
        return str(self.header.get("SeriesInstanceUID", ""))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        return int(self.header.Columns), int(self.header.Rows), len(self.frames)

    @cached_property
    def affine_lps(self) -> FloatArray:
        """4x4, from (column, row, slice) to millimetres in LPS."""
        first, last = self.frames[0], self.frames[-1]
        affine = np.eye(4)
        affine[:3, 0] = first.orientation[0] * first.spacing_mm[1]
        affine[:3, 1] = first.orientation[1] * first.spacing_mm[0]
        affine[:3, 2] = (last.position_mm - first.position_mm) / (len(self.frames) - 1)
        affine[:3, 3] = first.position_mm
        return affine

    @property
    def affine_ras(self) -> FloatArray:
        """4x4, from (column, row, slice) to millimetres in RAS."""
        affine: FloatArray = LPS_TO_RAS @ self.affine_lps
        return affine

    @property
    def sources(self) -> list[Dataset]:
        """The headers of its instances, each once, in the order of the slices."""
        return list({frame.uid: frame.header for frame in self.frames}.values())

    def read_voxels(self) -> npt.NDArray[np.float32]:
        """Decode and rescale; shape (columns, rows, slices).

        Raises:
            ImageError: naming the instance that cannot be decoded.
        """
        voxels = np.empty(self.shape, dtype=np.float32)
        places: dict[Path, list[int]] = defaultdict(list)
        for index, frame in enumerate(self.frames):
            places[frame.file].append(index)
        for file, indices in places.items():
            pixels = decode_pixels(file, self.frames[indices[0]].uid)
            for index in indices:
                frame = self.frames[index]
                if pixels.shape[0] <= frame.number or pixels.shape[1:] != voxels.shape[1::-1]:
                    raise ImageError(f"instance {frame.uid} has pixels of shape {pixels.shape}, unlike its header")
                voxels[:, :, index] = pixels[frame.number].T * frame.slope + frame.intercept
        return voxels


def read_series(files: Iterable[Path], name: str = "the selection") -> Series:
    """Put the frames of one series in order.

    Args:
        files: its instances, in any order.
        name: what to call the files in an error.

    Raises:
        ImageError: when there is no image among them, they are of several series, a slice is missing, or slices lie at
            the same place.
    """
    headers, notes = _read_headers(files)
    series = sorted({str(header.get("SeriesInstanceUID", "")) for _, header in headers})
    if len(series) != 1:
        raise ImageError(f"{name} holds {len(series) or 'no'} DICOM series; valid: one")
    frames = [frame for file, header in headers for frame in _frames_of(file, header)]
    frames = _one_grid(_without_localizers(frames, notes), notes, name)
    ordered = _one_a_place(_in_order(frames), notes, name)
    _check_distances(ordered, name)
    return Series(tuple(ordered), tuple(notes))


def find_dicom(folder: Path) -> list[Path]:
    """The files in a folder (not below it) that are DICOM, whatever their names."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom(path)]


def is_dicom(path: Path) -> bool:
    """Whether a file begins as PS3.10 says."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def decode_pixels(file: Path, uid: str) -> npt.NDArray[Any]:
    """Stored values of one instance, shape (frames, rows, columns), not rescaled.

    Raises:
        ImageError: naming the instance.
    """
    try:
        pixels = dcmread(file).pixel_array
    except (InvalidDicomError, *DECODING_ERRORS) as error:
        raise ImageError(f"instance {uid} cannot be decoded: {describe(error)}") from error
    return pixels[None] if pixels.ndim == 2 else pixels


def describe(error: BaseException) -> str:
    """What a decoder says, in one line and without the server's folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        " ".join("..." if word.startswith(("/", "'/")) else word for word in lines[-1].split())[:200]
        if lines
        else (type(error).__name__)
    )


def _read_headers(files: Iterable[Path]) -> tuple[list[tuple[Path, Dataset]], list[str]]:
    """Headers of the images, each instance once, and what was left out."""
    headers: dict[str, tuple[Path, Dataset]] = {}
    notes = []
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True)
        except (InvalidDicomError, *DECODING_ERRORS) as error:
            notes.append(f"file {file.name!r} left out, which is no DICOM: {describe(error)}")
            continue
        uid = str(header.get("SOPInstanceUID", "")) or file.name
        if uid in headers:
            notes.append(f"instance {uid} left out, which is there twice")
        elif "Rows" in header and "Columns" in header:
            headers[uid] = file, header
    return list(headers.values()), notes


def _frames_of(file: Path, header: Dataset) -> list[Frame]:
    """The frames of one instance.

    Raises:
        ImageError: naming the instance, when its header does not say where it lies.
    """
    uid = str(header.get("SOPInstanceUID", file.name))
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise ImageError(f"instance {uid} has {header.SamplesPerPixel} values a pixel; valid: one (no colours)")
    try:
        if "PerFrameFunctionalGroupsSequence" not in header:
            return [_frame(file, header, 0, header, header, header, header)]
        shared = header.SharedFunctionalGroupsSequence[0] if header.get("SharedFunctionalGroupsSequence") else Dataset()
        return [
            _frame(file, header, number, *(_group(keyword, groups, shared) for keyword in FUNCTIONAL_GROUPS))
            for number, groups in enumerate(header.PerFrameFunctionalGroupsSequence)
        ]
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise ImageError(f"instance {uid} does not say where it lies: {describe(error)}") from error


FUNCTIONAL_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)


def _group(keyword: str, of_frame: Dataset, shared: Dataset) -> Dataset:
    """A functional group (PS3.3, C.7.6.16) of a frame, or of all frames; empty where there is none."""
    items = of_frame.get(keyword) or shared.get(keyword)
    return items[0] if items else Dataset()


def _frame(
    file: Path, header: Dataset, number: int, place: Dataset, plane: Dataset, measures: Dataset, rescale: Dataset
) -> Frame:
    """One frame from the groups of attributes that describe it.

    Raises:
        AttributeError, TypeError, ValueError: for a header that lacks something, or where it is no number.
    """
    position = np.array(place.ImagePositionPatient, dtype=np.float64)
    orientation = np.array(plane.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    rows, columns = (float(value) for value in measures.PixelSpacing)
    if position.shape != (3,) or not np.isfinite([*position, *orientation.ravel(), rows, columns]).all():
        raise ValueError("Image Position, Orientation and Pixel Spacing must be finite numbers")
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
        return list(frames)  # then it is all that there is; whether it is a volume is seen by its geometry
    notes += [f"instance {frame.uid} left out, which is a localizer" for frame in localizers]
    return [frame for frame in frames if not frame.is_localizer]


def _one_grid(frames: Sequence[Frame], notes: list[str], name: str) -> list[Frame]:
    """The frames of the largest stack of one size and orientation.

    Raises:
        ImageError: when no stack has more than half of the frames.
    """
    counts = Counter(frame.grid for frame in frames).most_common()
    kept, most = counts[0]
    if 2 * most <= len(frames):
        raise ImageError(f"{name} holds {len(counts)} stacks of different size or orientation; valid: one")
    left_out = [frame for frame in frames if frame.grid != kept]
    notes += [f"instance {frame.uid} left out, of another size or orientation" for frame in left_out]
    return [frame for frame in frames if frame.grid == kept]


def _in_order(frames: Sequence[Frame]) -> list[Frame]:
    """Along the normal; at the same place, the one that was made first."""
    normal = np.cross(*frames[0].orientation)
    return sorted(frames, key=lambda f: (float(normal @ f.position_mm), int(f.header.get("InstanceNumber") or 0)))


def _one_a_place(frames: Sequence[Frame], notes: list[str], name: str) -> list[Frame]:
    """Leave out slices at the place of another one.

    Raises:
        ImageError: when there are several everywhere: phases, echoes or a time series, which are several volumes.
    """
    normal = np.cross(*frames[0].orientation)
    kept, doubled = [frames[0]], []
    for frame in frames[1:]:
        if normal @ (frame.position_mm - kept[-1].position_mm) < SAME_PLACE_MM:
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


def _check_distances(frames: Sequence[Frame], name: str) -> None:
    """Refuse a series with a gap: closed up, all behind it would lie somewhere else.

    Raises:
        ImageError: naming the slices on both sides of the gap.
    """
    if len(frames) < 3:
        return
    steps = np.diff(np.array([frame.position_mm for frame in frames]), axis=0)
    distances_mm = np.linalg.norm(steps, axis=1)
    usual = float(np.median(distances_mm))
    uneven = np.abs(distances_mm - usual) > MAX_UNEVEN_SHARE * usual
    if uneven.any():
        at = int(np.argmax(np.abs(distances_mm - usual)))
        raise ImageError(
            f"the slices of {name} are {distances_mm.min():.4g} to {distances_mm.max():.4g} mm apart, most of all "
            f"between instances {frames[at].uid} and {frames[at + 1].uid}; valid: evenly spaced slices, none missing"
        )
