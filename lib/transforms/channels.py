"""Cases of several sequences: which file is which channel, and reading all of them on one grid.

The files of a case are found once, when the studies are listed, and recorded next to the image that viewers display
(:func:`write_sources`). From the path of that image, any process finds the other sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.configs.preset import Preset
from lib.errors import ImageError
from lib.imagefiles.reading import read_voxels
from lib.storage.json_files import read_object, write_json
from lib.transforms.postprocess import interpolate_to_grid
from lib.transforms.volume import NIFTI_SUFFIXES, NRRD_SUFFIXES, Volume, read_volume

logger = logging.getLogger("unetr.datastore")

RECORD_SUFFIX = ".channels.json"
STACKED_AXES = 4


@dataclass(frozen=True)
class ChannelSources:
    """The files of one case of several sequences.

    Attributes:
        case_id: id of the case.
        files: channel name to file; in a 4D file, all channels have the same file.
        missing: names of required channels that the case lacks.
        problem: why the case cannot be used, apart from missing channels; empty if it can.
        notes: notes for the user on the geometry of the channels, one sentence each.
        shown: the file whose grid is used; by default that of the display channel.
    """

    case_id: str
    files: Mapping[str, Path]
    missing: tuple[str, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()
    shown: Path | None = None

    @property
    def stacked(self) -> bool:
        """Whether all channels are in one 4D file, in the preset's order along its last axis."""
        return len(self.files) > 1 and len(set(self.files.values())) == 1

    def check(self) -> None:
        """Refuse a case that cannot be read.

        Raises:
            ImageError: naming the missing channels or the problem.
        """
        if self.problem:
            raise ImageError(f"case {self.case_id!r} {self.problem}")
        if self.missing:
            raise ImageError(f"case {self.case_id!r} lacks the channels {', '.join(self.missing)}")


def missing_channels(files: Container[str], preset: Preset) -> tuple[str, ...]:
    """Names of the required channels that ``files`` lacks."""
    return tuple(c.name for c in preset.channels if not c.optional and c.name not in files)


def stacked_sources(case_id: str, file: Path, preset: Preset) -> ChannelSources:
    """A 4D file whose last axis holds the preset's channels."""
    return ChannelSources(case_id, {channel.name: file for channel in preset.channels})


def is_stacked(shape: tuple[int, ...], preset: Preset) -> bool:
    """Whether a file of this shape has the preset's channels along its last axis."""
    return len(shape) == STACKED_AXES and shape[3] == preset.in_channels > 1


def files_of(image: Path) -> list[Path]:
    """All files that are read for an image, including itself, in a fixed order."""
    others = {path for sources in read_sources(image).values() for path in sources.files.values()}
    return [image, *sorted(others - {image})]


def record_of(image: Path) -> Path:
    """The file that records the sources of an image's case, if it is a case of several sequences."""
    return image.with_name(stem_of(image) + RECORD_SUFFIX)


def write_sources(image: Path, by_preset: Mapping[str, ChannelSources], stamp: str) -> None:
    """Record the files of a case next to its displayed image.

    Args:
        image: file of the displayed image.
        by_preset: for each preset name, the file of each channel.
        stamp: value that changes when one of the files changes.
    """
    presets = {name: _as_json(sources) for name, sources in by_preset.items()}
    write_json(record_of(image), {"stamp": stamp, "presets": presets})


def read_stamp(image: Path) -> str:
    """The stamp passed to :func:`write_sources`; empty if there is no record."""
    return str(read_object(record_of(image)).get("stamp", ""))


def read_channels(sources: ChannelSources, preset: Preset) -> Volume:
    """Read a case on its display channel's grid; an optional channel that is missing is zero.

    Other channels are resampled to that grid by their affines, with linear interpolation; outside of them, voxels are
    0.

    Raises:
        ImageError: if a required channel is missing, or if a file cannot be used.
    """
    sources.check()
    volume = _read_stacked(next(iter(sources.files.values())), preset) if sources.stacked else _read(sources, preset)
    for channel, voxels in zip(preset.channels, volume.channels, strict=True):
        if not np.isfinite(voxels).all():
            raise ImageError(
                f"channel {channel.name!r} of case {sources.case_id!r} has voxels that are not finite numbers"
            )
    return volume


def _read(sources: ChannelSources, preset: Preset) -> Volume:
    display = preset.channels[preset.display_channel].name  # never optional, so it exists
    shown = sources.shown or sources.files[display]
    grid_of = next((name for name, file in sources.files.items() if file == shown), display)
    base = read_volume(shown)
    channels, notes = [], list(sources.notes)
    for channel in preset.channels:
        file = sources.files.get(channel.name)
        if file is None:
            channels.append(np.zeros_like(base.voxels))
            notes.append(f"the optional channel {channel.name} is missing: the network was given zeros")
        elif file == shown:
            channels.append(base.voxels)
        elif _lies_on(base, other := read_volume(file)):
            channels.append(other.voxels)
        else:
            channels.append(interpolate_to_grid(other.voxels, other.affine_ras, base.voxels.shape, base.affine_ras))
            notes.append(f"channel {channel.name} was resampled onto the grid of {grid_of}")
    return Volume(base.voxels, base.affine_ras, base.other_affine_ras, tuple(channels), tuple(notes))


def _read_stacked(path: Path, preset: Preset) -> Volume:
    header, voxels = read_voxels(path)
    if voxels.ndim != STACKED_AXES or voxels.shape[3] != preset.in_channels:
        raise ImageError(
            f"image {path.name!r} has shape {voxels.shape}; valid: 4D, with the {preset.in_channels} channels "
            f"{', '.join(channel.name for channel in preset.channels)} on the last axis"
        )
    channels = tuple(np.asarray(voxels[..., place], dtype=np.float32) for place in range(preset.in_channels))
    affine = np.asarray(header.affine_ras, dtype=np.float64)
    return Volume(channels[preset.display_channel], affine, None, channels)


def _lies_on(display: Volume, other: Volume) -> bool:
    return other.voxels.shape == display.voxels.shape and np.allclose(other.affine_ras, display.affine_ras, atol=1e-4)


def stem_of(path: Path) -> str:
    """A file's name without the extension of an image."""
    endings = [end for end in (*NIFTI_SUFFIXES, *NRRD_SUFFIXES) if path.name.lower().endswith(end)]
    return path.name[: -len(max(endings, key=len))] if endings else path.name


def read_sources(image: Path) -> dict[str, ChannelSources]:
    """The sources passed to :func:`write_sources` for an image; empty without a readable record."""
    try:
        return {name: _from_json(one) for name, one in read_object(record_of(image)).get("presets", {}).items()}
    except (KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used: %r", record_of(image), error)
        return {}


def _as_json(sources: ChannelSources) -> dict[str, Any]:
    return {
        "case": sources.case_id,
        "files": {name: str(path) for name, path in sources.files.items()},
        "missing": list(sources.missing),
        "problem": sources.problem,
        "notes": list(sources.notes),
        "shown": None if sources.shown is None else str(sources.shown),
    }


def _from_json(kept: Mapping[str, Any]) -> ChannelSources:
    files = {name: Path(path) for name, path in kept["files"].items()}
    shown = None if kept["shown"] is None else Path(kept["shown"])
    return ChannelSources(kept["case"], files, tuple(kept["missing"]), kept["problem"], tuple(kept["notes"]), shown)
