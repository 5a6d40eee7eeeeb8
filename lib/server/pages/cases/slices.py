"""Draws slices of volumes as PNG images on the server: the image, masks as contours, uncertainty as an overlay.

Contours are solid, dashed or dotted, so that masks can be distinguished without colour.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image

from lib.drawing.contours import Line, draw_outline

Voxel = TypeVar("Voxel", bound=np.generic)
Plane = Literal["axial", "coronal", "sagittal"]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
AXES: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The array axis perpendicular to each plane, for axes to right, anterior, superior."""
WINDOW_PERCENTILES = (0.5, 99.5)
OVERLAY_RGB = (240, 228, 66)
"""Yellow of Okabe and Ito's palette, which colour-blind readers can distinguish from the grey image."""
LEAST_SHOWN = 0.05
"""Lower uncertainty is not drawn."""


@dataclass(frozen=True)
class Contour:
    """A mask to outline: values, shape (X, Y, Z), the colour of each value, and the line style."""

    mask: npt.NDArray[np.uint8]
    colors: Mapping[int, tuple[int, ...]]
    line: Line = "solid"


@dataclass(frozen=True)
class Stack:
    """A volume with its axes permuted and flipped to right, anterior and superior, without resampling.

    Attributes:
        voxels: intensities, shape (R, A, S).
        spacing_mm: voxel size along these axes.
        window: intensities of black and white.
    """

    voxels: npt.NDArray[np.float32]
    spacing_mm: tuple[float, float, float]
    window: tuple[float, float] = field(default=(0.0, 1.0))

    @classmethod
    def of(cls, voxels: npt.NDArray[np.float32], affine_ras: npt.NDArray[np.float64]) -> Stack:
        """A stack from a volume of shape (X, Y, Z) with its 4x4 affine."""
        turned = reorient(voxels, affine_ras)
        axes = nib.io_orientation(affine_ras)[:, 0].astype(int)
        sizes = np.linalg.norm(affine_ras[:3, :3], axis=0)
        spacing = [float(sizes[list(axes).index(axis)]) for axis in range(3)]
        low, high = (float(value) for value in np.percentile(turned, WINDOW_PERCENTILES))
        return cls(turned, (spacing[0], spacing[1], spacing[2]), (low, high if high > low else low + 1))

    def count(self, plane: Plane) -> int:
        """Number of slices of a plane."""
        return int(self.voxels.shape[AXES[plane]])


def reorient(volume: npt.NDArray[Voxel], affine_ras: npt.NDArray[np.float64]) -> npt.NDArray[Voxel]:
    """A volume of shape (X, Y, Z) with its axes permuted and flipped to right, anterior and superior."""
    turned: npt.NDArray[Voxel] = nib.orientations.apply_orientation(volume, nib.io_orientation(affine_ras))
    return turned


def draw_slice(
    stack: Stack,
    plane: Plane,
    index: int,
    contours: Sequence[Contour] = (),
    uncertainty: npt.NDArray[np.float32] | None = None,
    height: int = 384,
) -> bytes:
    """One slice as a PNG in radiological orientation: the patient's right on the left, anterior or superior on top.

    Args:
        stack: the image.
        plane: orientation of the slice.
        index: index of the slice, clipped to 0 to ``stack.count(plane) - 1``.
        contours: masks with the same axes as ``stack.voxels``.
        uncertainty: values from 0 to 1, with the same axes.
        height: height in pixels; the width depends on the spacing.
    """
    axis = AXES[plane]
    at = int(np.clip(index, 0, stack.count(plane) - 1))
    low, high = stack.window
    grey = np.clip((_cut(stack.voxels, axis, at) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    size = _size(grey.shape, stack.spacing_mm, axis, height)
    shown = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC)
    if not contours and uncertainty is None:
        return _as_png(shown)  # as a greyscale image, which has a third of the bytes
    picture = np.asarray(shown.convert("RGB")).astype(np.float32)
    if uncertainty is not None:
        _lay_over(picture, _cut(uncertainty, axis, at), size)
    for contour in contours:
        draw_outline(picture, _cut(contour.mask, axis, at), contour.colors, contour.line)
    return _as_png(Image.fromarray(picture.astype(np.uint8)))


def middle_of(mask: npt.NDArray[np.uint8], plane: Plane) -> int | None:
    """The slice with the largest part of a mask; None for an empty mask."""
    others = tuple(axis for axis in range(3) if axis != AXES[plane])
    seen = np.count_nonzero(mask, axis=others)
    return int(seen.argmax()) if seen.any() else None


def _cut(volume: npt.NDArray[Voxel], axis: int, index: int) -> npt.NDArray[Voxel]:
    """A slice as rows from top to bottom and columns from the patient's right (or front) to the left (or back)."""
    cut: npt.NDArray[Voxel] = np.take(volume, index, axis=axis).T[::-1, ::-1]
    return cut


def _size(shape: tuple[int, ...], spacing_mm: tuple[float, float, float], axis: int, height: int) -> tuple[int, int]:
    """Width and height in pixels, with equal scale in both directions."""
    across, down = (spacing for i, spacing in enumerate(spacing_mm) if i != axis)
    width = shape[1] * across / (shape[0] * down) * height
    return max(1, round(min(width, 4 * height))), height


def _as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _lay_over(picture: npt.NDArray[np.float32], values: npt.NDArray[np.generic], size: tuple[int, int]) -> None:
    scaled = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32)).resize(size, Image.Resampling.BILINEAR)
    share = np.clip(np.asarray(scaled), 0, 1)
    share = np.where(share < LEAST_SHOWN, 0, share)[..., None] * 0.8
    picture *= 1 - share
    picture += share * np.array(OVERLAY_RGB, dtype=np.float32)
