"""Writes a mask as NIfTI or NRRD, with exactly the grid of the mask."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import numpy.typing as npt

from lib.configs.preset import Preset
from lib.errors import ParameterError
from lib.imagefiles.compression import pack_gzip
from lib.imagefiles.geometry import set_affine
from lib.transforms.volume import Affine, FloatArray

EXTENSIONS = (".nrrd", ".seg.nrrd", ".nii.gz", ".nii")
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def write_mask(
    labels: npt.NDArray[np.uint8], affine_ras: Affine, preset: Preset, extension: str, dtype: str, compress: bool
) -> Path:
    """Write a mask to a new temporary file, which the caller removes.

    Args:
        labels: shape (X, Y, Z).
        affine_ras: 4x4, voxel indices to millimetres in RAS.
        preset: provides names and colours for ``.seg.nrrd``.
        extension: one of ``EXTENSIONS``.
        dtype: one of ``DTYPES``.
        compress: whether to gzip the data of NRRD; ``.nii.gz`` is always compressed.

    Raises:
        ParameterError: for an unknown extension or type.
    """
    if extension not in EXTENSIONS:
        raise ParameterError("result_extension", extension, ", ".join(EXTENSIONS))
    if dtype not in DTYPES:
        raise ParameterError("result_dtype", dtype, ", ".join(DTYPES))
    highest = max(label.index for label in preset.labels)
    if np.dtype(dtype).kind in "iu" and highest > np.iinfo(dtype).max:
        raise ParameterError("result_dtype", dtype, f"a type that holds {highest}, the highest label's value")
    handle, name = tempfile.mkstemp(prefix="mask-", suffix=extension)
    os.close(handle)
    path = Path(name)
    voxels = labels.astype(dtype, copy=False)
    try:
        if extension.endswith(".nrrd"):
            _write_nrrd(path, voxels, affine_ras, preset if extension == ".seg.nrrd" else None, compress)
        else:
            _write_nifti(path, voxels, affine_ras)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def write_map(values: FloatArray, affine_ras: Affine) -> Path:
    """Write a scalar map of shape (X, Y, Z) to a new temporary ``.nii.gz``, which the caller removes."""
    handle, name = tempfile.mkstemp(prefix="mask-", suffix=".nii.gz")
    os.close(handle)
    path = Path(name)
    try:
        _write_nifti(path, values.astype(np.float32, copy=False), affine_ras)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _write_nifti(path: Path, voxels: npt.NDArray[Any], affine_ras: Affine) -> None:
    image = nib.Nifti1Image(voxels, affine_ras)
    set_affine(image, affine_ras)
    content = image.to_bytes()
    path.write_bytes(pack_gzip(content) if path.name.endswith(".gz") else content)


def _write_nrrd(
    path: Path, voxels: npt.NDArray[Any], affine_ras: Affine, preset: Preset | None, compress: bool
) -> None:
    header: dict[str, Any] = {
        "space": "left-posterior-superior",
        "kinds": ["domain"] * 3,
        "space directions": (RAS_TO_LPS @ affine_ras[:3, :3]).T,
        "space origin": RAS_TO_LPS @ affine_ras[:3, 3],
        "encoding": "gzip" if compress else "raw",
    }
    for position, label in enumerate(preset.labels if preset else ()):
        header |= {
            f"Segment{position}_ID": label.name,
            f"Segment{position}_Name": label.name,
            f"Segment{position}_Color": " ".join(f"{part / 255:.4f}" for part in label.color),
            f"Segment{position}_LabelValue": str(label.index),
            f"Segment{position}_Layer": "0",
        }
    nrrd.write(str(path), voxels, header, compression_level=1)
