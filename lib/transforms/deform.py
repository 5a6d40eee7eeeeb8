"""A random rotation, zoom, shift and smooth displacement of a crop, in one resampling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.networks.layers import GaussianFilter
from monai.transforms import MapTransform, Randomizable
from monai.transforms.utils import create_rotate, create_scale, create_translate

# Displacements are drawn at every fourth voxel only, which suffices for their smoothness and costs a sixty-fourth.
CELL_VOXELS = 4
# Standard deviation of the Gaussian and magnitude of the displacement in voxels, as in MONAI's Rand3DElastic.
SMOOTHNESS_VOXELS = (5.0, 7.0)
MAGNITUDE_VOXELS = (30.0, 90.0)


class RandDeformd(MapTransform, Randomizable):
    """Deforms crops of shape (1, X, Y, Z) like MONAI's ``RandAffine`` and ``Rand3DElastic``, with one resampling.

    One resampling instead of two blurs an image less, and the displacement is drawn on a coarse grid: augmentation has
    to keep up with training on a GPU, and takes cores from training on a CPU. Outside of the crop, its border voxels
    are repeated.

    Args:
        keys: dictionary keys; their volumes have one shape and are deformed alike.
        modes: ``bilinear`` or ``nearest`` for each key.
        affine_probability: probability of rotation, zoom and shift, which are applied together.
        rotation_radians: largest angle about each axis.
        zoom: largest relative zoom along each axis.
        translation_voxels: largest shift along each axis.
        elastic_probability: probability of a smooth displacement of up to two voxels.
    """

    def __init__(
        self,
        keys: Sequence[str],
        modes: Sequence[str],
        affine_probability: float,
        rotation_radians: float,
        zoom: float,
        translation_voxels: float,
        elastic_probability: float,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.modes = tuple(modes)
        self.affine_probability, self.elastic_probability = affine_probability, elastic_probability
        self.rotation_radians, self.zoom, self.translation_voxels = rotation_radians, zoom, translation_voxels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw a deformation, or none, and apply it to each key."""
        changed = dict(data)
        shape, device = tuple(changed[self.keys[0]].shape[1:]), changed[self.keys[0]].device
        matrix = self._draw_affine() if self.R.random() < self.affine_probability else None
        elastic = self.R.random() < self.elastic_probability
        if matrix is None and not elastic:
            return changed
        displacement = self._draw_displacement(shape, device) if elastic else None
        grid = sampling_grid(shape, np.eye(4) if matrix is None else matrix, displacement, device)
        for key, mode in self.key_iterator(changed, self.modes):
            volume = torch.as_tensor(changed[key])
            moved = F.grid_sample(volume[None].float(), grid, mode=mode, padding_mode="border", align_corners=True)
            changed[key] = moved[0].to(volume.dtype)
        return changed

    def _draw_affine(self) -> npt.NDArray[np.float64]:
        """A 4x4 matrix in voxels relative to the crop's centre."""
        angles, zooms, shifts = self.R.uniform(-1, 1, (3, 3))
        rotate = create_rotate(3, list(angles * self.rotation_radians))
        translate = create_translate(3, list(shifts * self.translation_voxels))
        return np.asarray(rotate @ translate @ create_scale(3, list(1 + zooms * self.zoom)))

    def _draw_displacement(self, shape: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
        """Displacement in voxels along each axis, shape (3, X, Y, Z)."""
        cells = [-(-size // CELL_VOXELS) + 1 for size in shape]
        noise = torch.from_numpy(self.R.uniform(-1, 1, (1, 3, *cells)).astype(np.float32)).to(device)
        smooth: torch.Tensor = GaussianFilter(3, self.R.uniform(*SMOOTHNESS_VOXELS) / CELL_VOXELS).to(device)(noise)
        # On the coarse grid a Gaussian averages fewer samples than on all voxels, and so reduces white noise less.
        factor = self.R.uniform(*MAGNITUDE_VOXELS) * CELL_VOXELS**-1.5
        return F.interpolate(factor * smooth, tuple(shape), mode="trilinear", align_corners=True)[0]


def sampling_grid(
    shape: Sequence[int],
    matrix: npt.NDArray[np.float64],
    displacement: torch.Tensor | None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The position in the volume from which each voxel of the result is sampled.

    Args:
        shape: shape of the volume.
        matrix: 4x4, from positions in the result to positions in the volume, in voxels relative to the centre.
        displacement: voxels that are first added to a position in the result, shape (3, X, Y, Z); None for none.
        device: device of the grid.

    Returns:
        Grid of shape (1, X, Y, Z, 3), for ``grid_sample`` with ``align_corners``.
    """
    middles = [(size - 1) / 2 for size in shape]
    places = []
    for axis, (size, middle) in enumerate(zip(shape, middles, strict=True)):
        across = [1] * 3
        across[axis] = size
        place = (torch.arange(size, dtype=torch.float32, device=device) - middle).reshape(across)
        places.append(place if displacement is None else place + displacement[axis])
    grid = torch.empty((1, *shape, 3), device=device)
    for axis, middle in enumerate(middles):
        x, y, z, shift = (float(number) / max(middle, 0.5) for number in matrix[axis])
        torch.add(x * places[0] + y * places[1], z * places[2] + shift, out=grid[0, ..., 2 - axis])
    return grid
