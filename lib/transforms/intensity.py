"""Intensities that a network can compare, with one copy of an image and no more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Transform
from monai.transforms.utils_pytorch_numpy_unification import percentile


class _BetweenEnds(MapTransform):
    """Base of the transforms that map the intensities of MetaTensors by a lower and an upper bound.

    Args:
        keys: of the dictionary.
        lower: the lower bound.
        upper: the upper bound.
    """

    def __init__(self, keys: Sequence[str], lower: float, upper: float) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change each key; what was given stays as it is."""
        changed = dict(data)
        for key in self.key_iterator(changed):
            image: MetaTensor = changed[key]
            changed[key] = MetaTensor(self._change(image.as_subclass(torch.Tensor)), affine=image.affine)
        return changed

    @abstractmethod
    def _change(self, voxels: torch.Tensor) -> torch.Tensor:
        """The new voxels."""


class Clipped(_BetweenEnds):
    """Clips an image to ``lower`` and ``upper``."""

    def _change(self, voxels: torch.Tensor) -> torch.Tensor:
        return voxels.clamp(self.lower, self.upper)


class Windowed(_BetweenEnds):
    """Scales an intensity window to [0, 1]: ``lower`` and all below becomes 0, ``upper`` and all above 1."""

    def _change(self, voxels: torch.Tensor) -> torch.Tensor:
        return (voxels - self.lower).div_(self.upper - self.lower).clamp_(0, 1)


class ClippedToPercentiles(_BetweenEnds):
    """Clips an image to two of its own percentiles, as MONAI's ``ClipIntensityPercentilesd`` without soft ends.

    MONAI's sorts the image for each of the two; on the host neither is needed to find them.
    """

    def _change(self, voxels: torch.Tensor) -> torch.Tensor:
        ends = percentile(voxels.numpy() if voxels.device.type == "cpu" else voxels, [self.lower, self.upper])
        lowest, highest = torch.as_tensor(ends).tolist()
        return voxels.clamp(lowest, highest)


class EachChannel(MapTransform):
    """Changes each channel of a MetaTensor of shape (C, X, Y, Z) by its own transforms.

    A channel that is 0 everywhere stays so: it stands for a sequence that the case lacks.

    Args:
        key: of the dictionary.
        chains: for each channel the transforms of dictionaries with ``key`` of shape (1, X, Y, Z).
    """

    def __init__(self, key: str, chains: Sequence[Sequence[Transform]]) -> None:
        super().__init__((key,))
        self.key, self.chains = key, [Compose(list(chain)) for chain in chains]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change each channel."""
        image: MetaTensor = data[self.key]
        plain = image.as_subclass(torch.Tensor)
        if len(plain) != len(self.chains):
            raise ValueError(f"an image of {len(plain)} channels was given to a preset of {len(self.chains)}")
        changed = []
        for channel, chain in zip(plain.split(1), self.chains, strict=True):
            if bool(channel.any()):
                channel = chain({self.key: MetaTensor(channel, affine=image.affine)})[self.key]
            changed.append(torch.as_tensor(channel).as_subclass(torch.Tensor).float())
        return {**data, self.key: MetaTensor(torch.cat(changed), affine=image.affine)}
