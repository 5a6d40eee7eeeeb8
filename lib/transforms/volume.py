"""Reading a volume from NIfTI, NRRD or a DICOM folder, and refusing what cannot be segmented."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from lib.configs.preset import Preset
from lib.dicom.series import Series, find_dicom, read_series
from lib.errors import ImageError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd", ".seg.nrrd")
MIN_AXIS_VOXELS = 4
MAX_SPACING_MM = 25.0
MIN_SPACING_MM = 0.01
MAX_NETWORK_VOXELS = 1_500_000_000
GRID_TOLERANCE_VOXELS = 0.1
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])

FloatArray = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a 3D image lie.

    Attributes:
        shape: (X, Y, Z).
        affine_ras: 4x4 matrix from voxel indices to millimetres in RAS.
    """

    shape: tuple[int, int, int]
    affine_ras: Affine

    @property
    def tolerance_mm(self) -> float:
        """How far apart two grids may lie and still be the same: a tenth of the shortest voxel edge."""
        return GRID_TOLERANCE_VOXELS * float(np.linalg.norm(self.affine_ras[:3, :3], axis=0).min())


@dataclass(frozen=True)
class Volume:
    """A 3D image.

    Attributes:
        voxels: intensities, shape (X, Y, Z), float32.
        affine_ras: 4x4 matrix from voxel indices to millimetres in RAS.
    """

    voxels: FloatArray
    affine_ras: Affine

    @property
    def grid(self) -> Grid:
        """Where its voxels lie."""
        x, y, z = self.voxels.shape
        return Grid((x, y, z), self.affine_ras)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each array axis."""
        x, y, z = np.linalg.norm(self.affine_ras[:3, :3], axis=0)
        return float(x), float(y), float(z)


def read_volume(path: Path) -> Volume:
    """Read a NIfTI or NRRD file, or a folder that holds one DICOM series.

    Raises:
        ImageError: when it is missing, damaged, empty, not 3D, or its geometry is not one.
    """
    if not path.exists():
        raise ImageError(f"image {path.name!r} does not exist")
    if path.is_file() and path.stat().st_size == 0:
        raise ImageError(f"image {path.name!r} is an empty file")
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return _read_nifti(path)
    if path.is_dir() or name.endswith(".dcm"):
        return _read_dicom(path)
    if name.endswith(ITK_SUFFIXES):
        return _read_itk(path)
    raise ImageError(f"image {path.name!r} is of an unknown kind; valid: {', '.join(NIFTI_SUFFIXES + ITK_SUFFIXES)}")


def read_grid(path: Path) -> Grid:
    """The grid of an image; of NIfTI and DICOM, only headers are read.

    Raises:
        ImageError: as :func:`read_volume`.
    """
    if path.is_dir():
        series = _read_series(path)
        return Grid(series.shape, _checked_affine(series.affine_ras, path.name))
    if not path.name.lower().endswith(NIFTI_SUFFIXES) or not path.is_file():
        return read_volume(path).grid
    with _as_image_error(path):
        image = nib.load(path)
        shape = _spatial_shape(image.shape, path.name)
    return Grid(shape, _checked_affine(image.affine, path.name))


def apart_mm(one: Grid, other: Grid) -> float:
    """How far apart the corners of two grids of the same shape lie at most, in millimetres."""
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(other.shape) - 1
    return float(np.linalg.norm((corners @ (one.affine_ras - other.affine_ras).T)[:, :3], axis=1).max())


def check_segmentable(volume: Volume, preset: Preset, name: str) -> None:
    """Refuse a volume that the preset's network cannot say anything sensible about.

    Raises:
        ImageError: when voxels are not finite or all equal, or the size or spacing is out of bounds.
    """
    extent_voxels, patch_size = _extent_at(volume, preset), preset.network.patch_size
    spacing = ", ".join(f"{s:.4g}" for s in volume.spacing_mm)
    if max(volume.spacing_mm) > MAX_SPACING_MM or min(volume.spacing_mm) < MIN_SPACING_MM:
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


def _read_nifti(path: Path) -> Volume:
    with _as_image_error(path):
        image = nib.load(path)
        shape = _spatial_shape(image.shape, path.name)
        _check_kind(image.get_data_dtype(), path.name)
        voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    return Volume(voxels, _checked_affine(image.affine, path.name))


@contextmanager
def _as_image_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise ImageError(f"image {path.name!r} is damaged or not NIfTI: {_last_line(error, path)}") from error
    except MemoryError as error:
        raise ImageError(f"image {path.name!r} says it has more voxels than memory holds") from error


def _read_dicom(path: Path) -> Volume:
    """A folder that holds one series, or a file that holds all its slices."""
    series = _read_series(path)
    return Volume(series.read_voxels(), _checked_affine(series.affine_ras, path.name))


def _read_series(path: Path) -> Series:
    kind = "folder" if path.is_dir() else "file"
    return read_series(find_dicom(path) if path.is_dir() else [path], f"{kind} {path.name!r}")


def _read_itk(path: Path) -> Volume:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ImageError(f"image {path.name!r} is damaged or no image: {_last_line(error, path)}") from error
    components = image.GetNumberOfComponentsPerPixel()
    shape = _spatial_shape((*image.GetSize(), *((components,) if components > 1 else ())), path.name)
    array = sitk.GetArrayViewFromImage(image)  # (Z, Y, X)
    _check_kind(array.dtype, path.name)
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)[:3, :3]
    affine_ras = np.eye(4)
    affine_ras[:3, :3] = LPS_TO_RAS @ direction * image.GetSpacing()[:3]
    affine_ras[:3, 3] = LPS_TO_RAS @ image.GetOrigin()[:3]
    voxels = np.array(array.T, dtype=np.float32).reshape(shape)
    return Volume(voxels, _checked_affine(affine_ras, path.name))


def _check_kind(dtype: npt.DTypeLike, name: str) -> None:
    """Refuse voxels that are not one real number each, such as colours."""
    if np.dtype(dtype).kind not in "iufb":
        raise ImageError(f"image {name!r} has voxels of type {dtype}; valid: one real number each")


def _spatial_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """The three spatial axes; trailing axes of length one are no fourth dimension."""
    trimmed = list(shape)
    while len(trimmed) > 3 and trimmed[-1] == 1:
        trimmed.pop()
    if len(trimmed) != 3 or min(trimmed) < 2:
        raise ImageError(f"image {name!r} has shape {tuple(shape)}; valid: 3D, with at least 2 voxels on every axis")
    x, y, z = trimmed
    return x, y, z


def _checked_affine(affine: Affine, name: str) -> Affine:
    affine_ras = np.asarray(affine, dtype=np.float64)
    if affine_ras.shape != (4, 4) or not np.isfinite(affine_ras).all():
        raise ImageError(f"image {name!r} has no usable affine: {affine_ras.tolist()}")
    if abs(np.linalg.det(affine_ras[:3, :3])) < 1e-12:
        raise ImageError(f"image {name!r} has an affine without volume (an axis of spacing 0, or two parallel axes)")
    return affine_ras


def _extent_at(volume: Volume, preset: Preset) -> list[float]:
    """Voxels per anatomical axis that the volume would have at the preset's spacing."""
    order = nib.io_orientation(volume.affine_ras)[:, 0]
    target = nib.orientations.axcodes2ornt(tuple(preset.axcodes))[:, 0]
    spacing_by_direction = {int(axis): preset.spacing_mm[i] for i, axis in enumerate(target)}
    return [
        size * spacing / spacing_by_direction[int(axis)]
        for size, spacing, axis in zip(volume.voxels.shape, volume.spacing_mm, order, strict=True)
    ]


def _last_line(error: BaseException, path: Path) -> str:
    """What an error of another library says in the end, without the folder, which is no client's business."""
    lines = [line.strip() for line in str(error).replace(str(path), path.name).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ")[:200] if lines else type(error).__name__
