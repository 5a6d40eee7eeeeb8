"""Normalisation of intensities, with only one copy of an image in memory."""

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
        keys: dictionary keys.
        lower: the lower bound.
        upper: the upper bound.
    """

    def __init__(self, keys: Sequence[str], lower: float, upper: float) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transform each key; the input is not modified."""
        changed = dict(data)
        for key in self.key_iterator(changed):
            image: MetaTensor = changed[key]
            changed[key] = MetaTensor(self._change(image.as_subclass(torch.Tensor)), affine=image.affine)
        return changed

    @abstractmethod
    def _change(self, voxels: torch.Tensor) -> torch.Tensor:
        """The transformed voxels."""


class Clipped(_BetweenEnds):
    """Clips the intensities of an image to ``lower`` and ``upper``."""

    def _change(self, voxels: torch.Tensor) -> torch.Tensor:
        return voxels.clamp(self.lower, self.upper)


class Windowed(_BetweenEnds):
    """Scales an intensity window to [0, 1]; values outside of it become 0 or 1."""

    def _change(self, voxels: torch.Tensor) -> torch.Tensor:
        return (voxels - self.lower).div_(self.upper - self.lower).clamp_(0, 1)


class ClippedToPercentiles(_BetweenEnds):
    """Clips an image to two of its own percentiles, like MONAI's ``ClipIntensityPercentilesd`` with hard limits.

    MONAI's transform sorts the image for each of the percentiles, which is not necessary on the host.
    """

    def _change(self, voxels: torch.Tensor) -> torch.Tensor:
        ends = percentile(voxels.numpy() if voxels.device.type == "cpu" else voxels, [self.lower, self.upper])
        lowest, highest = torch.as_tensor(ends).tolist()
        return voxels.clamp(lowest, highest)


class EachChannel(MapTransform):
    """Transforms each channel of a MetaTensor of shape (C, X, Y, Z) by its own transforms.

    A channel that is 0 everywhere is not changed: it represents a sequence that the case lacks.

    Args:
        key: dictionary key.
        chains: for each channel, the transforms of dictionaries with ``key`` of shape (1, X, Y, Z).
    """

    def __init__(self, key: str, chains: Sequence[Sequence[Transform]]) -> None:
        super().__init__((key,))
        self.key, self.chains = key, [Compose(list(chain)) for chain in chains]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transform each channel."""
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
