"""Reads a volume from NIfTI, NRRD or a DICOM folder, and refuses volumes that cannot be segmented."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from lib.configs.preset import Preset
from lib.dicom.files import find_dicom
from lib.dicom.series import Series, read_series
from lib.errors import ImageError
from lib.imagefiles.header import ImageHeader
from lib.imagefiles.reading import find_header, find_voxels

NIFTI_SUFFIXES = (".nii.gz", ".nii")
NRRD_SUFFIXES = (".nrrd", ".seg.nrrd")
MIN_AXIS_VOXELS = 4
MAX_SPACING_MM = 25.0
MIN_SPACING_MM = 0.01
ROUNDING = 1e-4
MAX_NETWORK_VOXELS = 1_500_000_000
GRID_TOLERANCE_VOXELS = 0.1
SMALLEST_VOXEL_MM3 = 1e-12
FARTHEST_MM = 1e7
"""Largest accepted length or distance, ten kilometres; much larger numbers overflow when they are squared."""

FloatArray = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """The voxel grid of a 3D image.

    Attributes:
        shape: (X, Y, Z).
        affine_ras: 4x4 matrix from voxel indices to millimetres in RAS, as ITK (3D Slicer) reads the header.
        other_affine_ras: the affine as nibabel reads the header, if it differs; None if both agree.
    """

    shape: tuple[int, int, int]
    affine_ras: Affine
    other_affine_ras: Affine | None = None

    @property
    def readings(self) -> list[Grid]:
        """The grid as ITK reads it, and the grid as nibabel reads it if it differs."""
        others = [] if self.other_affine_ras is None else [Grid(self.shape, self.other_affine_ras)]
        return [Grid(self.shape, self.affine_ras), *others]

    @property
    def tolerance_mm(self) -> float:
        """Largest distance between grids that count as equal: a tenth of the shortest voxel edge."""
        return GRID_TOLERANCE_VOXELS * float(np.linalg.norm(self.affine_ras[:3, :3], axis=0).min())


@dataclass(frozen=True)
class Volume:
    """A 3D image.

    Attributes:
        voxels: intensities, shape (X, Y, Z), float32.
        affine_ras: 4x4 matrix from voxel indices to millimetres in RAS, as ITK (3D Slicer) reads the header.
        other_affine_ras: the affine as nibabel reads the header, if it differs; None if both agree.
        channels: the sequences of a case of several, all on this grid, in the preset's order; ``voxels`` is one of
            them.
        notes: how channels were resampled to this grid, one sentence each.
    """

    voxels: FloatArray
    affine_ras: Affine
    other_affine_ras: Affine | None = None
    channels: tuple[FloatArray, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> Grid:
        """The voxel grid."""
        x, y, z = self.voxels.shape
        return Grid((x, y, z), self.affine_ras, self.other_affine_ras)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along each array axis."""
        x, y, z = np.linalg.norm(self.affine_ras[:3, :3], axis=0)
        return float(x), float(y), float(z)


def read_volume(path: Path) -> Volume:
    """Read a NIfTI or NRRD file, or a folder with one DICOM series. The content decides on the format.

    Raises:
        FileKindError: for a format that is not supported.
        MemoryBudgetError: if the header announces more voxels than fit into memory.
        ImageError: if it is missing, damaged, empty, not 3D, refers to another file, or has an invalid geometry.
    """
    header_and_voxels = None if _is_named_dicom(path) else find_voxels(path)
    if header_and_voxels is None:
        return _read_dicom(path)
    header, voxels = header_and_voxels
    grid = grid_of(header, path.name)
    voxels = np.asarray(voxels, dtype=np.float32).reshape(grid.shape, order="A")
    return Volume(voxels, grid.affine_ras, grid.other_affine_ras)


def read_grid(path: Path) -> Grid:
    """The grid of an image; only headers are read.

    Raises:
        FileKindError, ImageError: see :func:`read_volume`.
    """
    header = None if _is_named_dicom(path) else find_header(path)
    if header is not None:
        return grid_of(header, path.name)
    series = _read_series(path)
    return Grid(series.shape, _checked_affine(series.affine_ras, path.name))


def grid_of(header: ImageHeader, name: str) -> Grid:
    """The grid that a file header describes.

    Raises:
        ImageError: if it is not 3D, or has an invalid geometry.
    """
    grid = Grid(_spatial_shape(header.shape, name), _checked_affine(header.affine_ras, name))
    other = header.other_affine_ras
    if (
        other is None
        or not (np.abs(other) <= FARTHEST_MM).all()
        or abs(np.linalg.det(other[:3, :3])) < SMALLEST_VOXEL_MM3
    ):
        return grid
    return (
        grid if apart_mm(Grid(grid.shape, other), grid) <= grid.tolerance_mm else replace(grid, other_affine_ras=other)
    )


def apart_mm(one: Grid, other: Grid) -> float:
    """The largest distance between corresponding corners of two grids of the same shape, in millimetres."""
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(other.shape) - 1
    return float(np.linalg.norm((corners @ (one.affine_ras - other.affine_ras).T)[:, :3], axis=1).max())


def least_apart_mm(one: Grid, other: Grid) -> float:
    """Like :func:`apart_mm`, for the nearest readings if ITK and nibabel read a file differently."""
    return min(apart_mm(a, b) for a in one.readings for b in other.readings)


def reading_warning(grid: Grid) -> str:
    """A sentence if ITK and nibabel place an image differently; empty if they agree."""
    if grid.other_affine_ras is None:
        return ""
    apart = apart_mm(*grid.readings)
    return (
        f"ITK (3D Slicer) and nibabel place the image up to {apart:.3g} mm apart, since its NIfTI header contradicts "
        "itself (qform, sform, pixdim) or has another unit than mm (xyzt_units); it is read as ITK reads it"
    )


def check_segmentable(volume: Volume, preset: Preset, name: str) -> None:
    """Refuse a volume that the preset's network cannot segment sensibly.

    Raises:
        ImageError: if voxels are not finite or all equal, or if size or spacing are out of bounds.
    """
    if len(volume.channels) != len(preset.channels):
        needed = ", ".join(channel.name for channel in preset.channels) or "none"
        raise ImageError(
            f"image {name!r} was read with {len(volume.channels)} channels; "
            f"{preset.name!r} needs the channels: {needed}"
        )
    extent_voxels, patch_size = _extent_at(volume, preset), preset.network.patch_size
    spacing = ", ".join(f"{s:.4g}" for s in volume.spacing_mm)
    if max(volume.spacing_mm) > MAX_SPACING_MM or min(volume.spacing_mm) < MIN_SPACING_MM * (1 - ROUNDING):
        raise ImageError(
            f"image {name!r} has a spacing of {spacing} mm; valid: {MIN_SPACING_MM} to {MAX_SPACING_MM} mm"
        )
    if min(volume.voxels.shape) < MIN_AXIS_VOXELS or sorted(extent_voxels)[1] < patch_size:
        raise ImageError(
            f"image {name!r} is too small: {volume.voxels.shape} voxels of {spacing} mm; valid: at least "
            f"{MIN_AXIS_VOXELS} voxels an axis, and two axes of {patch_size} voxels at the spacing of "
            f"{preset.name!r} ({preset.spacing_mm} mm)"
        )
    if np.prod(extent_voxels) > MAX_NETWORK_VOXELS:
        raise ImageError(
            f"image {name!r} would have {np.prod(extent_voxels):.3g} voxels at the spacing of {preset.name!r}; "
            f"valid: at most {MAX_NETWORK_VOXELS:.3g}"
        )
    lowest, highest = float(volume.voxels.min()), float(volume.voxels.max())
    if not np.isfinite([lowest, highest]).all():
        bad = int(volume.voxels.size - np.isfinite(volume.voxels).sum())
        raise ImageError(f"image {name!r} has {bad} voxels that are not finite numbers")
    if lowest == highest:
        raise ImageError(f"image {name!r} is constant ({lowest:g} everywhere): there is nothing to segment")


def _is_named_dicom(path: Path) -> bool:
    """Whether the name identifies DICOM: a folder, or a file with the extension."""
    return path.is_dir() or (path.name.lower().endswith(".dcm") and path.is_file())


def _read_dicom(path: Path) -> Volume:
    """Read a folder with one series, or a file that holds all slices."""
    series = _read_series(path)
    return Volume(series.read_voxels(), _checked_affine(series.affine_ras, path.name))


def _read_series(path: Path) -> Series:
    kind = "folder" if path.is_dir() else "file"
    return read_series(find_dicom(path) if path.is_dir() else [path], f"{kind} {path.name!r}")


def _spatial_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """The three spatial axes; trailing axes of length one are ignored."""
    trimmed = list(shape)
    while len(trimmed) > 3 and trimmed[-1] == 1:
        trimmed.pop()
    if len(trimmed) != 3 or min(trimmed) < 2:
        raise ImageError(f"image {name!r} has shape {tuple(shape)}; valid: 3D, with at least 2 voxels on every axis")
    x, y, z = trimmed
    return x, y, z


def _checked_affine(affine: Affine, name: str) -> Affine:
    affine_ras = np.asarray(affine, dtype=np.float64)
    if affine_ras.shape != (4, 4) or not (np.abs(affine_ras) <= FARTHEST_MM).all():  # NaN fails this too
        raise ImageError(f"image {name!r} has no usable affine: {affine_ras.tolist()}")
    if abs(np.linalg.det(affine_ras[:3, :3])) < SMALLEST_VOXEL_MM3:
        raise ImageError(f"image {name!r} has an affine without volume (an axis of spacing 0, or two parallel axes)")
    return affine_ras


def _extent_at(volume: Volume, preset: Preset) -> list[float]:
    """Size of the volume along each anatomical axis, in voxels of the preset's spacing."""
    order = nib.io_orientation(volume.affine_ras)[:, 0]
    target = nib.orientations.axcodes2ornt(tuple(preset.axcodes))[:, 0]
    spacing_by_direction = {int(axis): preset.spacing_mm[i] for i, axis in enumerate(target)}
    return [
        size * spacing / spacing_by_direction[int(axis)]
        for size, spacing, axis in zip(volume.voxels.shape, volume.spacing_mm, order, strict=True)
    ]
