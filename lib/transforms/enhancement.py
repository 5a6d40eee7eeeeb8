"""CT crops as if less contrast medium, or none, had been given: labelled organs become less dense."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import MapTransform, Randomizable
from torch.nn import functional

from lib.transforms.phantom import FAT_HU

VARIATION_HU = 8.0
"""Standard deviation, between crops and labels, of what is dense without contrast medium."""
LEAST_VOXELS = 8
"""Voxels of a label below which nothing is said about its density."""


class RandUnenhancedd(MapTransform, Randomizable):
    """Takes contrast medium out of the labelled organs of a CT crop, with a given probability.

    In a scan without contrast medium a kidney is darker than the muscles beside it. A network that has only seen
    enhanced kidneys finds none there. A random part of the enhancement is removed, all of it in half of the crops.
    Densities above fat are scaled towards fat, so that a voxel of half an organ and half fat changes by half.

    Args:
        image, label: dictionary keys of a crop, tensors of shape (1, X, Y, Z).
        probability: probability of a change.
        hu: for each label value, its usual density without contrast medium; other labels are not changed.
        window: lowest and highest HU of the network's intensities.
    """

    def __init__(
        self, image: str, label: str, probability: float, hu: Mapping[int, float], window: tuple[float, float]
    ) -> None:
        MapTransform.__init__(self, (image, label))
        self.image, self.label, self.probability, self.hu, self.window = image, label, probability, dict(hu), window

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make the organs of a crop less dense, or change nothing."""
        changed = dict(data)
        if self.R.random() >= self.probability:
            return changed
        common = self.R.uniform(0, 2)
        image, label = (torch.as_tensor(changed[key]).as_subclass(torch.Tensor) for key in (self.image, self.label))
        lower, upper = self.window
        above_fat = (image * (upper - lower) + (lower - FAT_HU)).clamp(min=0)
        removed = torch.zeros_like(above_fat)
        for value, usual in self.hu.items():
            share, hu = min(1.0, common * self.R.uniform(0.8, 1.2)), self.R.normal(usual, VARIATION_HU)
            organ = label == value
            if int(organ.sum()) < LEAST_VOXELS:
                continue
            density = float(above_fat[organ].median())
            if density > hu - FAT_HU > 0:
                removed[organ] = share * (1 - (hu - FAT_HU) / density)
        changed[self.image] = image - _spread(removed) * above_fat / (upper - lower)
        return changed


def _spread(removed: torch.Tensor) -> torch.Tensor:
    """Shares that reach one voxel beyond each organ and then fade, since its blurred border does."""
    padded = functional.pad(removed[None], (2,) * 6, mode="replicate")
    return functional.avg_pool3d(functional.max_pool3d(padded, 3, 1), 3, 1)[0]
