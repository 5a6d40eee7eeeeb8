"""Resampling to another voxel size without copies for which a large volume leaves no memory.

Linear interpolation is done axis by axis, which is equivalent to resampling between grids with parallel axes. A
trilinear weight is the product of three linear ones, so that three one-dimensional interpolations give the same voxels
as MONAI's ``Spacing``, without a grid of coordinates (three float64 values for each voxel) and without a float64 copy
of the image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

# Values that are interpolated at a time, so that temporary arrays take some tens of megabytes.
CHUNK_NUMBERS = 8_000_000

TOLERANCE_MM = 1e-3


def interpolate_axis(
    volume: torch.Tensor, axis: int, position: torch.Tensor, chunk_numbers: int = CHUNK_NUMBERS
) -> torch.Tensor:
    """Interpolate along one axis.

    Args:
        volume: floating-point, any shape.
        axis: the axis.
        position: positions along the axis, in voxels, in any order; outside of the axis, its end voxel is repeated.
        chunk_numbers: number of values that are interpolated at a time.

    Returns:
        An array like ``volume``, with length ``len(position)`` along ``axis``.

    >>> interpolate_axis(torch.tensor([0.0, 10.0, 30.0]), 0, torch.tensor([0.5, 2.0, 9.0])).tolist()
    [5.0, 30.0, 30.0]
    """
    size = volume.shape[axis]
    if len(position) == size and torch.equal(position.double(), torch.arange(size, dtype=torch.float64)):
        return volume
    held = position.double().clamp(0, size - 1).to(volume.device)
    below = held.floor().long().clamp(max=max(0, size - 2))
    above = (below + 1).clamp(max=size - 1)
    share = (held - below).to(volume.dtype)
    shape = [*volume.shape[:axis], len(position), *volume.shape[axis + 1 :]]
    result = volume.new_empty(shape)
    across = volume.numel() // max(1, size)
    step = max(1, chunk_numbers // max(1, across))
    ones = [1] * (volume.ndim - axis - 1)
    for first in range(0, len(position), step):
        part = slice(first, first + step)
        low, high = volume.index_select(axis, below[part]), volume.index_select(axis, above[part])
        result.narrow(axis, first, low.shape[axis]).copy_(low.lerp_(high, share[part].reshape(-1, *ones)))
    return result


class Resampled(MapTransform):
    """Resamples MetaTensors of shape (1, X, Y, Z) to another voxel size; the position of the first voxel is kept.

    An axis whose voxel size equals the target within a micrometre is not changed. The result is contiguous in C order,
    whatever the order of the input.

    Args:
        keys: dictionary keys.
        spacing_mm: target voxel size along each axis.
        modes: ``bilinear`` or ``nearest`` for each key.
    """

    def __init__(self, keys: Sequence[str], spacing_mm: Sequence[float], modes: Sequence[str]) -> None:
        super().__init__(keys)
        self.spacing_mm, self.modes = tuple(spacing_mm), tuple(modes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample each key."""
        changed = dict(data)
        for key, mode in self.key_iterator(changed, self.modes):
            changed[key] = self._resample(changed[key], mode)
        return changed

    def _resample(self, image: MetaTensor, mode: str) -> MetaTensor:
        affine, volume = image.affine.double().cpu().clone(), image.as_subclass(torch.Tensor)
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
            volume = _along(volume, 1 + axis, position, mode)
            affine[:3, axis] *= wanted / have
        return MetaTensor(volume.contiguous(), affine=affine)


def resampled_size(size: int, have_mm: float, wanted_mm: float) -> int:
    """Number of voxels of size ``wanted_mm`` along an axis; the last one lies nearest to the previous last one."""
    if abs(wanted_mm - have_mm) < TOLERANCE_MM:
        return size
    return round((size - 1) * have_mm / wanted_mm + 1)


def _along(volume: torch.Tensor, axis: int, position: torch.Tensor, mode: str) -> torch.Tensor:
    """Resample along an axis at fractional voxel positions; the result has the volume's memory order."""
    order = sorted(range(volume.ndim), key=lambda axis: -volume.stride()[axis])
    if order != list(range(volume.ndim)):
        turned = _along(volume.permute(order), order.index(axis), position, mode)
        return turned.permute([order.index(axis) for axis in range(volume.ndim)])
    if mode == "bilinear":
        return interpolate_axis(volume, axis, position)
    return volume.index_select(axis, position.round().long().clamp(0, volume.shape[axis] - 1).to(volume.device))
