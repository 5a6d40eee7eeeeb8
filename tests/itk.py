"""Where ITK, and so 3D Slicer and OHIF, place an image: the reference that grids are compared with."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk


def affine_lps(image: sitk.Image) -> np.ndarray:
    """The 4x4 affine from voxels to millimetres in LPS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


def affine_ras(image: sitk.Image) -> np.ndarray:
    """The 4x4 affine from voxels to millimetres in RAS."""
    return np.diag([-1.0, -1, 1, 1]) @ affine_lps(image)
