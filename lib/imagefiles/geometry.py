"""The position of a NIfTI image in space, as ITK (3D Slicer, OHIF) reads it, and as nibabel does if both disagree.

ITK uses the qform if there is one, unless the code of the sform is 1 (scanner) and its axes are orthonormal. It always
uses the spacing of ``pixdim``, and always respects the unit. Without any code, the image lies along its own axes, in
LPS. A table of cases in the tests compares this with SimpleITK. NIfTI-2, which older versions of ITK do not open, is
read in the same way. See https://nifti.nimh.nih.gov/nifti-1/documentation
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.quaternions import quat2mat
from nibabel.spatialimages import HeaderDataError

Affine = npt.NDArray[np.float64]

SCANNER = 1
ORTHONORMAL_TOLERANCE = 1e-4
MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
"""Millimetres of each unit, by the three lowest bits of ``xyzt_units``: metre, millimetre, micrometre; millimetres by
default.
"""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def itk_affine_ras(header: Any) -> Affine:
    """The affine of a NIfTI header as ITK reads it, in millimetres; a sheared sform alone, which ITK refuses, is kept.

    Args:
        header: the unmodified header of the file, without corrections by nibabel.
    """
    # nifti_io, which ITK uses, replaces NaN by 0, and ITK replaces a length of 0 by 1; the sign is kept
    pixdim = np.nan_to_num(np.asarray(header["pixdim"][1:4], dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    spacing = np.where(pixdim == 0, 1.0, pixdim)
    qform_code, sform_code = int(header["qform_code"]), int(header["sform_code"])
    sform = np.vstack([header[f"srow_{axis}"] for axis in "xyz"]).astype(np.float64)
    directions = _directions(sform[:, :3])
    affine = np.eye(4)
    if qform_code == 0 and sform_code == 0:
        affine[:3, :3] = _LPS_TO_RAS * spacing
    elif directions is not None and sform_code != 0 and (qform_code == 0 or sform_code == SCANNER):
        affine[:3, :3], affine[:3, 3] = directions * spacing, sform[:, 3]
    elif qform_code != 0:
        affine[:3, :3] = _rotation(header) * spacing
        affine[:3, 3] = [_number(header[f"qoffset_{axis}"]) for axis in "xyz"]
    else:
        affine[:3] = sform
    affine[:3] *= MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def nibabel_affine_ras(header: Any) -> Affine | None:
    """The affine as nibabel reads it, which ignores units; None if it refuses the header."""
    try:
        return np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return None


def set_affine(image: nib.Nifti1Image, affine_ras: Affine) -> None:
    """Set the affine in millimetres: as qform and sform, or only as sform if the axes are sheared.

    A qform cannot represent a shear, and ITK would use it instead of the sform.
    """
    image.header.set_xyzt_units("mm")
    image.set_sform(affine_ras, code="scanner")
    if _directions(affine_ras[:3, :3]) is None:
        image.set_qform(None, code="unknown")
    else:
        image.set_qform(affine_ras, code="scanner")


def _directions(matrix: Affine) -> Affine | None:
    """The columns scaled to length 1; None if they are not orthogonal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = matrix / np.linalg.norm(matrix, axis=0)
        square = np.abs(directions.T @ directions - np.eye(3)).max() < ORTHONORMAL_TOLERANCE
    return directions if square else None


def _rotation(header: Any) -> Affine:
    """The axes of the qform: its quaternion, with the third axis reversed if ``pixdim[0]`` is negative."""
    b, c, d = (_number(header[f"quatern_{part}"]) for part in "bcd")
    rest = 1.0 - (b * b + c * c + d * d)
    if rest < 1e-7:  # by rounding, there is no real part
        length = np.sqrt(b * b + c * c + d * d)
        quaternion = [0.0, b / length, c / length, d / length]
    else:
        quaternion = [np.sqrt(rest), b, c, d]
    rotation = np.asarray(quat2mat(quaternion), dtype=np.float64)
    if float(header["pixdim"][0]) < 0:
        rotation[:, 2] *= -1
    return rotation


def _number(value: Any) -> float:
    return float(value) if np.isfinite(value) else 0.0
