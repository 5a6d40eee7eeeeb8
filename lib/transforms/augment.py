"""Random crops and augmentations for training."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import (
    Compose,
    DeleteItemsd,
    EnsureTyped,
    MapTransform,
    RandAdjustContrastd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianSmoothd,
    Randomizable,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Transform,
)

from lib.configs.preset import Augmentation, Preset, Window
from lib.transforms.deform import RandDeformd
from lib.transforms.enhancement import RandUnenhancedd
from lib.transforms.phantom import RandArmsd, RandPhantomd
from lib.transforms.preprocess import IMAGE, LABEL

# Voxels that are sampled to find the centre of a crop, and the smallest number of foreground or background voxels among
# them.
SAMPLED_VOXELS = 4096
VOXELS_PER_LABEL = 64
ENOUGH = 32


class RandCropBySampledLabeld(RandCropByPosNegLabeld):
    """MONAI's random crop around foreground or background, without a list of all voxels of a case for each draw.

    A random sample of voxels is used instead; its foreground voxels are distributed like those of a full list. If the
    sample has too few voxels of either kind, all voxels are listed.
    """

    def randomize(
        self, label: torch.Tensor | None = None, fg_indices: Any = None, bg_indices: Any = None, image: Any = None
    ) -> None:
        """Draw the centres of the crops of a label of shape (1, X, Y, Z)."""
        if label is not None and fg_indices is None and bg_indices is None:
            looked_at = torch.from_numpy(self.cropper.R.randint(label.numel(), size=SAMPLED_VOXELS))
            foreground = torch.as_tensor(label).reshape(-1)[looked_at] > 0
            sampled = looked_at[foreground], looked_at[~foreground]
            if min(map(len, sampled)) >= ENOUGH:
                fg_indices, bg_indices = sampled
        super().randomize(label, fg_indices, bg_indices, image)


class RandCropByBalancedLabeld(RandCropByPosNegLabeld):
    """MONAI's random crop around foreground or background, in which all labels of a case are equally frequent."""

    def randomize(
        self, label: torch.Tensor | None = None, fg_indices: Any = None, bg_indices: Any = None, image: Any = None
    ) -> None:
        """Draw the centres of the crops of a label of shape (1, X, Y, Z)."""
        if label is not None and fg_indices is None and bg_indices is None:
            fg_indices, bg_indices = self._balanced_indices(torch.as_tensor(label).reshape(-1).numpy())
        super().randomize(label, fg_indices, bg_indices, image)

    def _balanced_indices(self, values: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
        """Equally many flat indices of every label that is present, with repetition, and some of the background."""
        foreground = np.flatnonzero(values)
        background = self.cropper.R.randint(values.size, size=SAMPLED_VOXELS)
        background = background[values[background] == 0]
        of_label = values[foreground]
        drawn = [
            self.cropper.R.choice(foreground[of_label == value], size=VOXELS_PER_LABEL)
            for value in np.flatnonzero(np.bincount(of_label, minlength=1))
        ]
        chosen = np.concatenate(drawn) if drawn else foreground
        return torch.from_numpy(chosen), torch.from_numpy(background)


class RandSlabd(MapTransform, Randomizable):
    """Keeps a random slab of planes along the last axis and sets the rest to 0, like a scan with few slices.

    Without it, a network trained on whole abdomens takes the padding around a scan of 40 mm for air.

    Args:
        keys: dictionary keys of tensors of shape (1, X, Y, Z).
        probability: probability of a change.
        planes: smallest and largest number of planes of the slab.
    """

    def __init__(self, keys: Sequence[str], probability: float, planes: tuple[int, int]) -> None:
        MapTransform.__init__(self, keys)
        self.probability, self.planes = probability, planes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Set everything outside of a random slab of planes to 0, the same slab in every key, or change nothing."""
        changed = dict(data)
        if self.R.random() >= self.probability:
            return changed
        depth = int(changed[self.keys[0]].shape[-1])
        least, most = (min(planes, depth) for planes in self.planes)
        kept = int(self.R.randint(least, most + 1))
        first = int(self.R.randint(0, depth - kept + 1))
        for key in self.key_iterator(changed):
            tensor = torch.as_tensor(changed[key])
            cut = torch.zeros_like(tensor)
            cut[..., first : first + kept] = tensor[..., first : first + kept]
            changed[key] = cut
        return changed


class RandDropChannelsd(MapTransform, Randomizable):
    """Sets optional channels to 0 at random, independently, like a case that lacks them.

    Args:
        key: dictionary key of a tensor of shape (channels, X, Y, Z).
        places: indices of the optional channels.
        probability: probability of dropping each of them.
    """

    def __init__(self, key: str, places: Sequence[int], probability: float = 0.25) -> None:
        MapTransform.__init__(self, (key,))
        self.key, self.places, self.probability = key, tuple(places), probability

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Drop some of the channels, or none."""
        drawn = self.R.random(len(self.places))
        gone = [place for place, number in zip(self.places, drawn, strict=True) if number < self.probability]
        image = torch.as_tensor(data[self.key]).clone()
        image[gone] = 0
        return {**data, self.key: image}


class RandNoised(MapTransform, Randomizable):
    """Adds Gaussian noise on the image's device, with a random standard deviation of at most ``std``."""

    def __init__(self, keys: Sequence[str], probability: float, std: float) -> None:
        MapTransform.__init__(self, keys)
        self.probability, self.std = probability, std

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add noise to all keys, or to none."""
        changed = dict(data)
        if self.R.random() >= self.probability:
            return changed
        deviation = self.R.uniform(0, self.std)
        for key in self.key_iterator(changed):
            image = torch.as_tensor(changed[key])
            generator = torch.Generator(image.device).manual_seed(int(self.R.randint(2**31)))
            noise = torch.randn(image.shape, generator=generator, device=image.device)
            changed[key] = image + noise.mul_(deviation)
        return changed


def build_cropping(preset: Preset, crops_per_case: int, doubts: Sequence[str] = ()) -> Compose:
    """Build the transform that draws random crops, balanced between foreground and background.

    Args:
        preset: the preset.
        crops_per_case: number of crops from each case.
        doubts: dictionary keys of tensors that say which classes of a label are not known from a person. They become
            false for a drawn crop (``phantom_probability``), of which all is known.

    Returns:
        A transform from a dictionary with ``image`` and ``label`` of shape (1, X, Y, Z) to a list of
        ``crops_per_case`` dictionaries with crops of shape (1, *roi_size).
    """
    both = (IMAGE, LABEL)
    balanced = preset.training.crop_balance == "labels"
    crop = (RandCropByBalancedLabeld if balanced else RandCropBySampledLabeld)(
        keys=both,
        label_key=LABEL,
        spatial_size=preset.roi_size,
        pos=preset.training.foreground_ratio,
        neg=1.0,
        num_samples=crops_per_case,
    )
    typed = EnsureTyped(both, track_meta=False)
    arms, phantoms = _drawing(preset, doubts)
    return Compose([*arms, crop, *phantoms, typed, DeleteItemsd("case")])


def _drawing(preset: Preset, doubts: Sequence[str]) -> tuple[list[Transform], list[Transform]]:
    """What draws body parts: into a whole case, and in place of a crop."""
    change, window = preset.training.augmentation, preset.intensity
    if not isinstance(window, Window):  # such a preset has no probability of either
        return [], []
    where = preset.spacing_mm, (window.lower, window.upper)
    arms: list[Transform] = [RandArmsd(IMAGE, LABEL, change.arm_probability, *where, preset.roi_size[0])]
    phantoms: list[Transform] = [RandPhantomd(IMAGE, (LABEL, *doubts), change.phantom_probability, *where)]
    return arms if change.arm_probability else [], phantoms if change.phantom_probability else []


def build_changes(preset: Preset) -> Compose:
    """Build the random augmentations of one crop, which run on its device: first what needs labels that fit exactly.

    Flips are applied only along the axes that the preset allows, since a flipped right kidney is a left one.

    Args:
        preset: the preset, with its ``training.augmentation``.

    Returns:
        A transform of a dictionary with ``image`` and ``label`` of shape (1, X, Y, Z); float32 and uint8.
    """
    change = preset.training.augmentation
    mirror = [RandFlipd((IMAGE, LABEL), prob=0.5, spatial_axis=axis) for axis in preset.mirror_axes]
    typed = [
        EnsureTyped(IMAGE, dtype=torch.float32, track_meta=False),
        EnsureTyped(LABEL, dtype=torch.uint8, track_meta=False),
    ]
    slab = [RandSlabd((IMAGE, LABEL), change.slab_probability, change.slab_planes)] if change.slab_probability else []
    dropped = [place for place, channel in enumerate(preset.channels) if channel.optional]
    drop = [RandDropChannelsd(IMAGE, dropped)] if dropped else []
    return Compose([*_unenhanced(preset), *mirror, *_spatial(change), *_intensity(change), *slab, *drop, *typed])


def _unenhanced(preset: Preset) -> list[Transform]:
    """What takes contrast medium out of organs."""
    change, window = preset.training.augmentation, preset.intensity
    if not (change.unenhanced_probability and isinstance(window, Window)):
        return []
    hu = {preset.label_indices[name]: value for name, value in change.unenhanced_hu}
    return [RandUnenhancedd(IMAGE, LABEL, change.unenhanced_probability, hu, (window.lower, window.upper))]


def _spatial(change: Augmentation) -> list[Transform]:
    if not (change.spatial_probability or change.elastic_probability):
        return []
    deform = RandDeformd(
        (IMAGE, LABEL),
        ("bilinear", "nearest"),
        affine_probability=change.spatial_probability,
        rotation_radians=math.radians(change.rotation_degrees),
        zoom=change.zoom,
        translation_voxels=change.translation_voxels,
        elastic_probability=change.elastic_probability,
    )
    return [deform]


def _intensity(change: Augmentation) -> list[Transform]:
    chain: list[Transform] = []
    if change.blur_probability:
        sigma = (0.4, 0.9)
        chain.append(RandGaussianSmoothd(IMAGE, sigma, sigma, sigma, prob=change.blur_probability))
    if change.gamma_probability:
        chain.append(RandAdjustContrastd(IMAGE, prob=change.gamma_probability, gamma=(0.7, 1.5), retain_stats=True))
    if change.intensity_probability:
        chain.append(RandScaleIntensityd(IMAGE, factors=change.intensity_scale, prob=change.intensity_probability))
        chain.append(RandShiftIntensityd(IMAGE, offsets=change.intensity_shift, prob=change.intensity_probability))
    if change.noise_probability:
        chain.append(RandNoised((IMAGE,), change.noise_probability, change.noise_std))
    return chain
