"""Random crops and changes to them, for training."""

from __future__ import annotations

import math

import torch
from monai.transforms import (
    Compose,
    DeleteItemsd,
    EnsureTyped,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Transform,
)

from lib.configs.preset import Augmentation, Preset
from lib.transforms.preprocess import IMAGE, LABEL


def build_augmentation(preset: Preset, crops_per_case: int) -> Compose:
    """Build the random part of training: foreground-balanced crops, then spatial and intensity changes.

    Mirroring happens only along the axes that the preset allows, since a mirrored right kidney is a left one.

    Args:
        preset: the task and its ``training.augmentation``.
        crops_per_case: crops drawn from each case.

    Returns:
        A transform from a dictionary with ``image`` and ``label`` of shape (1, X, Y, Z) to a list of
        ``crops_per_case`` dictionaries with crops of shape (1, *roi_size); float32 and uint8.
    """
    change = preset.training.augmentation
    both = (IMAGE, LABEL)
    crop = RandCropByPosNegLabeld(
        keys=both,
        label_key=LABEL,
        spatial_size=preset.roi_size,
        pos=preset.training.foreground_ratio,
        neg=1.0,
        num_samples=crops_per_case,
    )
    mirror = [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in preset.mirror_axes]
    typed = [
        EnsureTyped(IMAGE, dtype=torch.float32, track_meta=False),
        EnsureTyped(LABEL, dtype=torch.uint8, track_meta=False),
    ]
    return Compose([crop, *mirror, *_spatial(change), *_intensity(change), *typed, DeleteItemsd("case")])


def _spatial(change: Augmentation) -> list[Transform]:
    both, modes = (IMAGE, LABEL), ("bilinear", "nearest")
    angle = math.radians(change.rotation_degrees)
    chain: list[Transform] = []
    if change.spatial_probability:
        chain.append(
            RandAffined(
                both,
                prob=change.spatial_probability,
                rotate_range=(angle,) * 3,
                scale_range=(change.zoom,) * 3,
                translate_range=(change.translation_voxels,) * 3,
                mode=modes,
                padding_mode="border",
            )
        )
    if change.elastic_probability:
        # A smooth field: control displacements of up to two voxels after a Gaussian of 5 to 7 voxels.
        chain.append(
            Rand3DElasticd(
                both,
                sigma_range=(5, 7),
                magnitude_range=(30, 90),
                prob=change.elastic_probability,
                mode=modes,
                padding_mode="border",
            )
        )
    return chain


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
        chain.append(RandGaussianNoised(IMAGE, prob=change.noise_probability, std=change.noise_std))
    return chain
