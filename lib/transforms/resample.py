"""Resampling to other axes and another voxel size without copies for which a large volume leaves no memory.

Linear interpolation is done axis by axis, which is equivalent to resampling between grids with parallel axes. A
trilinear weight is the product of three linear ones, so that three one-dimensional interpolations give the same voxels
as MONAI's ``Spacing``, without a grid of coordinates (three float64 values for each voxel) and without a float64 copy
of the image. An axis that is to point the other way is read from its end, and voxels are clipped as they are read, so
that no reoriented and no clipped copy of the image is made.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

# Values that are interpolated at a time, so that temporary arrays take some tens of megabytes.
CHUNK_NUMBERS = 8_000_000

TOLERANCE_MM = 1e-3


Bounds = tuple[float, float]


def interpolate_axis(
    volume: torch.Tensor,
    axis: int,
    position: torch.Tensor,
    chunk_numbers: int = CHUNK_NUMBERS,
    *,
    from_end: bool = False,
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """Interpolate along one axis.

    Args:
        volume: floating-point, any shape.
        axis: the axis.
        position: positions along the axis, in voxels, in any order; outside of the axis, its end voxel is repeated.
        chunk_numbers: number of values that are interpolated at a time.
        from_end: whether positions count from the axis's last voxel to its first.
        bounds: values are clipped to these before they are interpolated.

    Returns:
        An array like ``volume``, with length ``len(position)`` along ``axis``.

    >>> interpolate_axis(torch.tensor([0.0, 10.0, 30.0]), 0, torch.tensor([0.5, 2.0, 9.0])).tolist()
    [5.0, 30.0, 30.0]
    """
    size = volume.shape[axis]
    if len(position) == size and torch.equal(position.double(), torch.arange(size, dtype=torch.float64)):
        return _as_it_is(volume, [axis] if from_end else [], bounds)
    held = position.double().clamp(0, size - 1).to(volume.device)
    below = held.floor().long().clamp(max=max(0, size - 2))
    above = (below + 1).clamp(max=size - 1)
    share = (held - below).to(volume.dtype)
    if from_end:
        below, above = size - 1 - below, size - 1 - above
    shape = [*volume.shape[:axis], len(position), *volume.shape[axis + 1 :]]
    result = volume.new_empty(shape)
    across = volume.numel() // max(1, size)
    step = max(1, chunk_numbers // max(1, across))
    ones = [1] * (volume.ndim - axis - 1)
    for first in range(0, len(position), step):
        part = slice(first, first + step)
        low, high = volume.index_select(axis, below[part]), volume.index_select(axis, above[part])
        if bounds is not None:
            low.clamp_(*bounds)
            high.clamp_(*bounds)
        result.narrow(axis, first, low.shape[axis]).copy_(low.lerp_(high, share[part].reshape(-1, *ones)))
    return result


class Resampled(MapTransform):
    """Resamples MetaTensors of shape (C, X, Y, Z) to given axes and another voxel size.

    The first voxel of the axes keeps its position. An axis whose voxel size equals the target within a micrometre is
    not interpolated. The result is contiguous in C order, whatever the order of the input.

    Args:
        keys: dictionary keys.
        axcodes: the direction to which each axis of the result points, such as ``RAS``.
        spacing_mm: target voxel size along each of these axes.
        modes: ``bilinear`` or ``nearest`` for each key.
        bounds: images (``bilinear``) are clipped to these before they are interpolated; by default they are not.
    """

    def __init__(
        self,
        keys: Sequence[str],
        axcodes: str,
        spacing_mm: Sequence[float],
        modes: Sequence[str],
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__(keys)
        self.axcodes, self.spacing_mm, self.modes, self.bounds = axcodes, tuple(spacing_mm), tuple(modes), bounds

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample each key."""
        changed = dict(data)
        for key, mode in self.key_iterator(changed, self.modes):
            changed[key] = self._resample(changed[key], mode)
        return changed

    def _resample(self, image: MetaTensor, mode: str) -> MetaTensor:
        volume, affine, turned = _along_axes(image, self.axcodes)
        bounds = self.bounds if mode == "bilinear" else None
        spacing = affine[:3, :3].norm(dim=0).tolist()
        # The axis with the largest reduction comes first, so that less data remains for the others. Of two equal ones,
        # the axis with the larger memory stride comes first: along it whole rows are copied, along the other single
        # voxels.
        kept = [round(spacing[axis] / self.spacing_mm[axis], 6) for axis in range(3)]
        for axis in sorted(range(3), key=lambda axis: (kept[axis], -volume.stride()[1 + axis])):
            have, wanted = spacing[axis], self.spacing_mm[axis]
            if abs(wanted - have) < TOLERANCE_MM:
                continue
            size = resampled_size(volume.shape[1 + axis], have, wanted)
            position = torch.arange(size, dtype=torch.float64) * (wanted / have)
            volume = _along(volume, 1 + axis, position, mode, axis in turned, bounds)
            affine[:3, axis] *= wanted / have
            turned, bounds = turned - {axis}, None
        volume = _as_it_is(volume, [1 + axis for axis in sorted(turned)], bounds)
        return MetaTensor(volume.contiguous(), affine=affine)


def resampled_size(size: int, have_mm: float, wanted_mm: float) -> int:
    """Number of voxels of size ``wanted_mm`` along an axis; the last one lies nearest to the previous last one."""
    if abs(wanted_mm - have_mm) < TOLERANCE_MM:
        return size
    return round((size - 1) * have_mm / wanted_mm + 1)


def _along_axes(image: MetaTensor, axcodes: str) -> tuple[torch.Tensor, torch.Tensor, frozenset[int]]:
    """A view of an image with its axes in the order of ``axcodes``, the affine along them, and the axes to turn round.

    The affine is that of the image after these axes have been turned round.
    """
    affine = image.affine.double().cpu().numpy()
    wanted = nib.orientations.axcodes2ornt(tuple(axcodes))
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
    places, signs = turn[:, 0].astype(int).tolist(), turn[:, 1].tolist()
    order = sorted(range(3), key=lambda axis: places[axis])
    volume = image.as_subclass(torch.Tensor).permute(0, *(1 + axis for axis in order))
    along = torch.from_numpy(affine @ nib.orientations.inv_ornt_aff(turn, image.shape[1:]))
    return volume, along, frozenset(places[axis] for axis in range(3) if signs[axis] < 0)


def _as_it_is(volume: torch.Tensor, turned: list[int], bounds: Bounds | None) -> torch.Tensor:
    """A volume whose voxels need no interpolation: only some axes are turned round, and values clipped."""
    volume = volume.flip(turned) if turned else volume
    return volume if bounds is None else volume.clamp(*bounds)


def _along(
    volume: torch.Tensor, axis: int, position: torch.Tensor, mode: str, from_end: bool, bounds: Bounds | None
) -> torch.Tensor:
    """Resample along an axis at fractional voxel positions; the result has the volume's memory order."""
    order = sorted(range(volume.ndim), key=lambda axis: -volume.stride()[axis])
    if order != list(range(volume.ndim)):
        turned = _along(volume.permute(order), order.index(axis), position, mode, from_end, bounds)
        return turned.permute([order.index(axis) for axis in range(volume.ndim)])
    if mode == "bilinear":
        return interpolate_axis(volume, axis, position, from_end=from_end, bounds=bounds)
    nearest = position.round().long().clamp(0, volume.shape[axis] - 1)
    nearest = volume.shape[axis] - 1 - nearest if from_end else nearest
    return volume.index_select(axis, nearest.to(volume.device))
