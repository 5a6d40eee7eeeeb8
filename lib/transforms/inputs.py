"""Reads the input of a preset's network, which is one image or a case of several sequences."""

from __future__ import annotations

from pathlib import Path

from lib.configs.preset import Preset
from lib.errors import ImageError
from lib.imagefiles.reading import read_header
from lib.transforms.channel_search import sources_in
from lib.transforms.channels import (
    ChannelSources,
    is_stacked,
    read_channels,
    read_sources,
    stacked_sources,
    stem_of,
)
from lib.transforms.volume import Volume, read_volume


def read_input(image: Path, preset: Preset) -> Volume:
    """Read an image, or for a preset with channels the case that it belongs to.

    Args:
        image: a file or a DICOM folder. For a case of several sequences, it is the file next to which its sources are
            recorded, a 4D file, or a folder of files that are named by their channels.
        preset: the preset.

    Raises:
        FileKindError, MemoryBudgetError, ImageError: see :func:`read_volume`; also if a required channel is missing.
    """
    return read_channels(sources_of(image, preset), preset) if preset.channels else read_volume(image)


def sources_of(image: Path, preset: Preset) -> ChannelSources:
    """The files of the case that an image belongs to.

    Raises:
        ImageError: if no other sequences of the image are known.
    """
    kept = read_sources(image)
    if preset.name in kept:
        return kept[preset.name]
    if image.is_dir() and (sources := sources_in(image, preset)) is not None:
        return sources
    if image.is_file() and is_stacked(read_header(image).shape, preset):
        return stacked_sources(stem_of(image), image, preset)
    needed = ", ".join(channel.name for channel in preset.channels)
    raise ImageError(f"image {stem_of(image)!r} lacks other sequences; {preset.name!r} needs the channels {needed}")
