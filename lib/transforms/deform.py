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

# A displacement is drawn at every fourth voxel: it is smoother than that, and costs a sixty-fourth.
CELL_VOXELS = 4
# Deviations of the Gaussian and the factor after it, both as MONAI's Rand3DElastic has them, in voxels.
SMOOTHNESS_VOXELS = (5.0, 7.0)
MAGNITUDE_VOXELS = (30.0, 90.0)


class RandDeformd(MapTransform, Randomizable):
    """Moves crops of shape (1, X, Y, Z) as MONAI's ``RandAffine`` and then ``Rand3DElastic`` would, looking once.

    One resampling instead of two blurs an image less, and a displacement is drawn on a coarse grid: drawing crops must
    keep up with a GPU that trains on them, and takes cores from a CPU that does. Beyond an end its voxel is repeated.

    Args:
        keys: of the dictionary; all of one shape, moved alike.
        modes: ``bilinear`` or ``nearest`` for each key.
        affine_probability: of rotation, zoom and shift, together.
        rotation_radians: most, about each axis.
        zoom: most, as a share, along each axis.
        translation_voxels: most, along each axis.
        elastic_probability: of a smooth displacement, of up to two voxels.
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
        """Draw a movement, or none, and apply it to each key."""
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
        """A 4x4 matrix in voxels from the crop's middle."""
        angles, zooms, shifts = self.R.uniform(-1, 1, (3, 3))
        rotate = create_rotate(3, list(angles * self.rotation_radians))
        translate = create_translate(3, list(shifts * self.translation_voxels))
        return np.asarray(rotate @ translate @ create_scale(3, list(1 + zooms * self.zoom)))

    def _draw_displacement(self, shape: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
        """Voxels along each axis, of shape (3, X, Y, Z)."""
        cells = [-(-size // CELL_VOXELS) + 1 for size in shape]
        noise = torch.from_numpy(self.R.uniform(-1, 1, (1, 3, *cells)).astype(np.float32)).to(device)
        smooth: torch.Tensor = GaussianFilter(3, self.R.uniform(*SMOOTHNESS_VOXELS) / CELL_VOXELS).to(device)(noise)
        # A Gaussian averages fewer places here than it would among all voxels, and so leaves more of white noise.
        factor = self.R.uniform(*MAGNITUDE_VOXELS) * CELL_VOXELS**-1.5
        return F.interpolate(factor * smooth, tuple(shape), mode="trilinear", align_corners=True)[0]


def sampling_grid(
    shape: Sequence[int],
    matrix: npt.NDArray[np.float64],
    displacement: torch.Tensor | None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Where each voxel of the result looks.

    Args:
        shape: of the volume.
        matrix: 4x4, from places in the result to places in the volume, in voxels from the middle.
        displacement: voxels that are added to a place in the result first, of shape (3, X, Y, Z); None: none.
        device: where the grid is made.

    Returns:
        Of shape (1, X, Y, Z, 3), as ``grid_sample`` takes it with ``align_corners``.
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
