"""The preprocessing chain from a volume to the network's input, shared by inference, training and validation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureTyped,
    NormalizeIntensityd,
    SpatialPadd,
    Transform,
)

from lib.configs.preset import Preset, Window, ZScore
from lib.transforms.intensity import Clipped, ClippedToPercentiles, EachChannel, Windowed
from lib.transforms.resample import Resampled, resampled_size
from lib.transforms.volume import Affine, Volume

IMAGE = "image"
LABEL = "label"


def build_preprocessing(preset: Preset, keys: Sequence[str] = (IMAGE,)) -> Compose:
    """Build the deterministic chain: clipping, axes and spacing, intensity, padding to the window.

    Intensities are clipped to the window before voxels are interpolated. A CT with the full range of Hounsfield units
    and the same CT stored with clipped values then give the same input: if voxels were interpolated first, the border
    between air and skin would move.

    Args:
        preset: the preset.
        keys: ``("image",)``, or ``("image", "label")`` for training.

    Returns:
        A transform of dictionaries whose ``keys`` are MetaTensors of shape (1, X, Y, Z) with an affine; the image
        becomes float32, the label keeps its values.
    """
    modes = ["bilinear" if key == IMAGE else "nearest" for key in keys]
    padding = ["edge" if preset.padding == "edge" and key == IMAGE else "constant" for key in keys]
    return Compose(
        [
            *_clipping_of_channels(preset),
            Resampled(keys, preset.axcodes, preset.spacing_mm, modes, _bounds(preset)),
            *_intensity(preset),
            SpatialPadd(keys=keys, spatial_size=preset.roi_size, mode=padding),
            EnsureTyped(keys=IMAGE, dtype=torch.float32),
        ]
    )


def as_meta_tensor(
    voxels: npt.NDArray[np.generic], affine_ras: Affine, device: torch.device | None = None
) -> MetaTensor:
    """Wrap an array of shape (X, Y, Z) as the (1, X, Y, Z) MetaTensor that the chain takes, by default on the host.

    The memory order of the array is kept: files store X contiguously, and to transpose a CT of 512x512x200 takes a
    second.
    """
    if voxels.flags.f_contiguous:
        tensor = torch.from_numpy(voxels.T).permute(2, 1, 0)[None]
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(voxels))[None]
    return MetaTensor(tensor if device is None else tensor.to(device), affine=torch.from_numpy(affine_ras))


def volume_tensor(volume: Volume, device: torch.device | None = None) -> MetaTensor:
    """A volume as a (channels, X, Y, Z) MetaTensor for the chain; one channel if it has no sequences."""
    if not volume.channels:
        return as_meta_tensor(volume.voxels, volume.affine_ras, device)
    tensor = torch.stack([torch.from_numpy(np.ascontiguousarray(channel)) for channel in volume.channels])
    return MetaTensor(tensor if device is None else tensor.to(device), affine=torch.from_numpy(volume.affine_ras))


def preprocess_volume(volume: Volume, preset: Preset, device: torch.device | None = None) -> MetaTensor:
    """Return the network's input for ``volume``: shape (channels, X, Y, Z), float32, with its own affine.

    Args:
        volume: the image.
        preset: the preset.
        device: device of the computation and the result; by default the host.
    """
    image = volume_tensor(volume, device)
    data: dict[Hashable, MetaTensor] = {IMAGE: image}
    result: MetaTensor = build_preprocessing(preset)(data)[IMAGE]
    return result


def network_shape(shape: Sequence[int], affine_ras: Affine, preset: Preset) -> tuple[int, int, int]:
    """The shape (X, Y, Z) of the result of :func:`preprocess_volume`, without computing it."""
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine_ras), nib.orientations.axcodes2ornt(tuple(preset.axcodes))
    )
    spacing_mm = np.linalg.norm(affine_ras[:3, :3], axis=0)
    sizes = list(preset.roi_size)
    for axis, (target, _) in enumerate(turn.astype(int)):
        resampled = resampled_size(shape[axis], float(spacing_mm[axis]), preset.spacing_mm[target])
        sizes[target] = max(preset.roi_size[target], resampled)
    x, y, z = sizes
    return x, y, z


def _bounds(preset: Preset) -> tuple[float, float] | None:
    """What all voxels are clipped to before they are interpolated; None if channels are clipped one by one."""
    window = preset.intensity
    return (window.lower, window.upper) if isinstance(window, Window) and not preset.channels else None


def _clipping_of_channels(preset: Preset) -> list[Transform]:
    """Clip each channel to its own window."""
    if not preset.channels:
        return []
    windows = [channel.intensity or preset.intensity for channel in preset.channels]
    chains = [[Clipped((IMAGE,), w.lower, w.upper)] if isinstance(w, Window) else [] for w in windows]
    return [EachChannel(IMAGE, chains)] if any(chains) else []


def _intensity(preset: Preset) -> list[Transform]:
    if preset.channels:
        return [EachChannel(IMAGE, [_scaled_by(channel.intensity or preset.intensity) for channel in preset.channels])]
    return _scaled_by(preset.intensity)


def _scaled_by(intensity: Window | ZScore) -> list[Transform]:
    if isinstance(intensity, Window):
        return [Windowed((IMAGE,), intensity.lower, intensity.upper)]
    return [
        ClippedToPercentiles((IMAGE,), intensity.lower_percentile, intensity.upper_percentile),
        NormalizeIntensityd(IMAGE),
    ]
