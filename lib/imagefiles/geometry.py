"""Where NIfTI places an image: as ITK (3D Slicer, OHIF) reads it, and as nibabel does, where the two disagree.

ITK takes the qform where there is one, unless the code of the sform is 1 (scanner) and its axes are orthonormal; its
spacing is always ``pixdim`` and its unit always counts; without any code the image lies in its own axes, in LPS. The
table of cases in the tests holds this against SimpleITK itself. NIfTI-2, which older ITK does not open, is read alike. https://nifti.nimh.nih.gov/nifti-1/documentation
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
"""By the three lowest bits of ``xyzt_units``: metre, millimetre, micrometre; what is not said is millimetres."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def itk_affine_ras(header: Any) -> Affine:
    """The affine of a NIfTI header as ITK has it, in millimetres; a sheared sform alone, which it refuses, as it is.

    Args:
        header: as it is in the file; nibabel must not have mended it.
    """
    # nifti_io, which ITK reads with, takes what is no number for 0, and ITK a length of 0 for 1; the sign stays
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
    """The affine as nibabel has it, which knows no units; None where it refuses the header."""
    try:
        return np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return None


def set_affine(image: nib.Nifti1Image, affine_ras: Affine) -> None:
    """Set where an image lies, in millimetres: as qform and sform, or as sform alone where the axes are sheared.

    A qform cannot say a shear, and ITK would read it in place of the sform.
    """
    image.header.set_xyzt_units("mm")
    image.set_sform(affine_ras, code="scanner")
    if _directions(affine_ras[:3, :3]) is None:
        image.set_qform(None, code="unknown")
    else:
        image.set_qform(affine_ras, code="scanner")


def _directions(matrix: Affine) -> Affine | None:
    """The columns at length 1; None where they are not at right angles."""
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = matrix / np.linalg.norm(matrix, axis=0)
        square = np.abs(directions.T @ directions - np.eye(3)).max() < ORTHONORMAL_TOLERANCE
    return directions if square else None


def _rotation(header: Any) -> Affine:
    """The qform's axes: its quaternion, with the third turned round where ``pixdim[0]`` is negative."""
    b, c, d = (_number(header[f"quatern_{part}"]) for part in "bcd")
    rest = 1.0 - (b * b + c * c + d * d)
    if rest < 1e-7:  # rounding: no real part
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
