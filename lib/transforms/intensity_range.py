"""Checks whether intensities match the modality: Hounsfield units for CT, and other values for MR."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from lib.configs.preset import Preset
from lib.errors import OtherModalityError
from lib.transforms.volume import Volume, reading_warning

MOST_SAMPLES = 500_000
SMALLEST_RANGE_HU = 100.0
HIGHEST_DARK_HU = -50.0
"""Highest first-percentile value of a CT: every CT of a body contains air (-1000 HU) or fat (-100 HU)."""
DENSE_HU = (700.0, 1400.0)
MOST_DENSE_SHARE = 0.1
"""Largest share of dense bone, which is a few per cent of a body; soft tissue appears as bone if 1024 was added."""
LOWEST_BRIGHT_HU = -150.0
LOWEST_MR = -500.0


def warnings_of(volume: Volume, preset: Preset) -> list[str]:
    """Warnings to show before the segmentation of an image is used, one sentence each."""
    warnings = (range_warning(volume.voxels, preset.modality), reading_warning(volume.grid), *volume.notes)
    return [warning for warning in warnings if warning]


def range_warning(voxels: npt.NDArray[np.generic], modality: str) -> str:
    """A sentence on intensities that are unusual for the modality; empty if they are usual.

    It uses percentiles of at most half a million evenly spaced voxels, so that outliers and padding have no effect.

    Args:
        voxels: intensities, of any shape.
        modality: ``CT`` or ``MR``.
    """
    flat = voxels.reshape(-1) if voxels.flags.c_contiguous else voxels.ravel(order="K")
    sample = flat[:: max(1, flat.size // MOST_SAMPLES)].astype(np.float32)
    low, high = (float(p) for p in np.percentile(sample, (0.5, 99.5)))
    extent = f"intensities of {low:.4g} to {high:.4g} (0.5 and 99.5 percentiles)"
    if modality == "CT" and (oddity := _odd_for_ct(sample, low, high)):
        return f"{extent} are not Hounsfield units: {oddity}; the segmentation is probably wrong"
    if modality == "MR" and low < LOWEST_MR:
        wrong = "but the model was trained on MR; the segmentation is probably wrong"
        return f"{extent} look like Hounsfield units, {wrong}"
    return ""


def misfit(voxels: npt.NDArray[np.generic], modality: str, served_modalities: Collection[str]) -> str:
    """Why an image rather belongs to a preset of another modality that is also served; empty if it does not.

    A folder with CT and MR is one pool, but nobody should have to label the organs of a CT in an MR image.

    Args:
        voxels: intensities, of any shape.
        modality: modality of the preset.
        served_modalities: modalities of all served presets.
    """
    if not (warning := range_warning(voxels, modality)):
        return ""
    fitting = [
        other for other in sorted(set(served_modalities)) if other != modality and not range_warning(voxels, other)
    ]
    return f"it looks like {' or '.join(fitting)}, for which another preset is served: {warning}" if fitting else ""


def check_modality(
    voxels: npt.NDArray[np.generic], preset: Preset, served_modalities: Collection[str], name: str
) -> None:
    """Refuse an image that rather belongs to a preset of another modality that is also served.

    Raises:
        OtherModalityError: stating the reason.
    """
    if reason := misfit(voxels, preset.modality, served_modalities):
        raise OtherModalityError(f"image {name!r} is not for {preset.name!r}: {reason}")


def _odd_for_ct(sample: npt.NDArray[np.float32], low: float, high: float) -> str:
    if high - low < SMALLEST_RANGE_HU:
        return "tissue differs by hundreds of them (values scaled to a small range)"
    if high < LOWEST_BRIGHT_HU:
        return "nothing is as dense as water (an offset subtracted twice)"
    dense = float(np.mean((sample > DENSE_HU[0]) & (sample < DENSE_HU[1])))
    if dense > MOST_DENSE_SHARE:
        return f"{dense:.0%} of the voxels would be dense bone (values with 1024 added)"
    if low > HIGHEST_DARK_HU:
        return "there is neither air nor fat (values with an offset added, or scaled to 0 and more)"
    return ""
