"""Cases of several sequences: which file is which channel, and reading them on one grid."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.configs.preset import Preset, canonical_name
from lib.errors import ImageError
from lib.imagefiles.reading import read_header, read_voxels
from lib.transforms.postprocess import interpolate_to_grid
from lib.transforms.volume import NIFTI_SUFFIXES, FloatArray, Volume, read_volume

NNUNET_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<place>\d{4})$")
"""Of a file name without its ending: the case, and the channel's place among the preset's channels."""


@dataclass(frozen=True)
class ChannelSources:
    """The files of one case of several sequences.

    Attributes:
        case_id: of the case.
        files: channel name to its file; of one 4D file, every channel's.
        missing: names of required channels that the case lacks.
    """

    case_id: str
    files: Mapping[str, Path]
    missing: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether all channels are in one 4D file, in the preset's order on its last axis."""
        return len(self.files) > 1 and len(set(self.files.values())) == 1


def find_channel_sources(folder: Path, preset: Preset) -> list[ChannelSources]:
    """The cases in a folder: 4D files, files with nnU-Net's suffixes, and folders of files named by channel.

    A file of another kind, such as a 3D image without a suffix, is no case.

    Raises:
        ImageError: when two files of a case are the same channel.
    """
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            for file in sorted(path.iterdir()):
                name = _channel_of(file, preset) if file.name.endswith(NIFTI_SUFFIXES) else None
                if name is not None:
                    _add(found[path.name], name, file, path.name)
        elif path.name.endswith(NIFTI_SUFFIXES):
            stem = _stem(path)
            match = NNUNET_SUFFIX.match(stem)
            if match and int(match["place"]) < preset.in_channels:
                _add(found[match["case"]], preset.channels[int(match["place"])].name, path, match["case"])
            elif len(shape := read_header(path).shape) == 4 and shape[3] == preset.in_channels:
                for channel in preset.channels:
                    _add(found[stem], channel.name, path, stem)
    return [ChannelSources(case_id, files, missing_channels(files, preset)) for case_id, files in sorted(found.items())]


def missing_channels(files: Mapping[str, Path], preset: Preset) -> tuple[str, ...]:
    """Names of the required channels that are not among ``files``."""
    return tuple(c.name for c in preset.channels if not c.optional and c.name not in files)


def read_channels(sources: ChannelSources, preset: Preset) -> Volume:
    """Read a case on its display channel's grid; an optional channel that it lacks is zeros.

    Other channels are brought onto that grid by their affines, with linear interpolation; beyond their ends is 0.

    Raises:
        ImageError: when a required channel is missing, or a file cannot be used.
    """
    if sources.missing:
        raise ImageError(f"case {sources.case_id!r} lacks the channels {', '.join(sources.missing)}")
    volume = _read_stacked(next(iter(sources.files.values())), preset) if sources.stacked else _read(sources, preset)
    for channel, voxels in zip(preset.channels, volume.channels, strict=True):
        if not np.isfinite(voxels).all():
            raise ImageError(
                f"channel {channel.name!r} of case {sources.case_id!r} has voxels that are not finite numbers"
            )
    return volume


def _read(sources: ChannelSources, preset: Preset) -> Volume:
    display = read_volume(sources.files[preset.channels[preset.display_channel].name])
    channels = []
    for place, channel in enumerate(preset.channels):
        file = sources.files.get(channel.name)
        if place == preset.display_channel:
            channels.append(display.voxels)
        else:
            channels.append(np.zeros_like(display.voxels) if file is None else _on_grid_of(display, read_volume(file)))
    return Volume(display.voxels, display.affine_ras, display.other_affine_ras, tuple(channels))


def _read_stacked(path: Path, preset: Preset) -> Volume:
    header, voxels = read_voxels(path)
    if voxels.ndim != 4 or voxels.shape[3] != preset.in_channels:
        raise ImageError(
            f"image {path.name!r} has shape {voxels.shape}; valid: 4D, with the {preset.in_channels} channels "
            f"{', '.join(channel.name for channel in preset.channels)} on the last axis"
        )
    channels = tuple(np.asarray(voxels[..., place], dtype=np.float32) for place in range(preset.in_channels))
    affine = np.asarray(header.affine_ras, dtype=np.float64)
    return Volume(channels[preset.display_channel], affine, None, channels)


def _on_grid_of(display: Volume, other: Volume) -> FloatArray:
    if other.voxels.shape == display.voxels.shape and np.allclose(other.affine_ras, display.affine_ras, atol=1e-4):
        return other.voxels
    return interpolate_to_grid(other.voxels, other.affine_ras, display.voxels.shape, display.affine_ras)


def _channel_of(path: Path, preset: Preset) -> str | None:
    """The channel whose name or alias is among a file name's words; the longest name wins (t1_contrast, not t1)."""
    words = f"_{canonical_name(_stem(path))}_"
    fitting = [(len(name), c.name) for c in preset.channels for name in c.names() if f"_{name}_" in words]
    return max(fitting)[1] if fitting else None


def _stem(path: Path) -> str:
    suffix = next(suffix for suffix in NIFTI_SUFFIXES if path.name.endswith(suffix))
    return path.name.removesuffix(suffix)


def _add(files: dict[str, Path], channel: str, path: Path, case_id: str) -> None:
    if channel in files:
        raise ImageError(
            f"case {case_id!r} has two files for the channel {channel!r}: {files[channel].name!r} and {path.name!r}"
        )
    files[channel] = path
