"""Finds the files of a folder that are the channels of a case, by their names and shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lib.configs.preset import Preset, canonical_name
from lib.errors import ImageError
from lib.imagefiles.reading import read_header
from lib.transforms.channels import ChannelSources, is_stacked, missing_channels, stacked_sources, stem_of
from lib.transforms.volume import NIFTI_SUFFIXES

NNUNET_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<place>\d{4})$")
"""Pattern of a file name without extension: the case, and the index of the channel among the preset's channels."""
ENDINGS = (*NIFTI_SUFFIXES, ".nrrd")
SEGMENTATION = ".seg.nrrd"

Shape = tuple[int, ...]


class KnownShapes:
    """A cache of the shapes in file headers; a changed file is read again."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], Shape]] = {}

    def __call__(self, path: Path) -> Shape:
        """The shape in the header; empty for a file that is damaged or not an image."""
        try:
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if path not in self._known or self._known[path][0] != stamp:
                self._known[path] = (stamp, _shape_in(path))
            return self._known[path][1]
        except OSError:
            return ()


@dataclass
class _CaseFiles:
    """The files of one case by channel, and their problem."""

    files: dict[str, Path] = field(default_factory=dict)
    problem: str = ""

    def add(self, channel: str, path: Path) -> None:
        if channel in self.files and not self.problem:
            names = f"{self.files[channel].name!r} and {path.name!r}"
            self.problem = f"has two files for the channel {channel!r}: {names}"
        self.files.setdefault(channel, path)


def find_channel_sources(
    folder: Path, preset: Preset, skipped: Iterable[str] = (), shape_of: Callable[[Path], Shape] | None = None
) -> list[ChannelSources]:
    """The cases in a folder: 4D files, files with nnU-Net's suffixes, and folders of files named by channel.

    Files of other kinds, such as a 3D image without a suffix, and damaged files are ignored.

    Args:
        folder: folder to search.
        preset: a preset with channels.
        skipped: names of subfolders to ignore.
        shape_of: returns the shape of a file; by default it is read from the header.
    """
    shape_of = shape_of or KnownShapes()
    cases: dict[str, _CaseFiles] = defaultdict(_CaseFiles)
    stacked: dict[str, ChannelSources] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            for file in sorted(path.iterdir()) if path.name not in skipped else ():
                name = channel_named(stem_of(file), preset) if _is_image(file) else None
                if name is not None:
                    cases[path.name].add(name, file)
        elif _is_image(path):
            stem = stem_of(path)
            case_id, name = _numbered(stem, preset)
            if name is not None:
                cases[case_id].add(name, path)
            elif is_stacked(shape_of(path), preset):
                stacked[stem] = stacked_sources(stem, path, preset)
    named = {c: ChannelSources(c, f.files, missing_channels(f.files, preset), f.problem) for c, f in cases.items()}
    return [sources for _, sources in sorted((stacked | named).items())]


def sources_in(folder: Path, preset: Preset) -> ChannelSources | None:
    """The only case in a folder, of files with nnU-Net's suffixes or the channels' names; None if there is none."""
    case = _CaseFiles()
    for file in sorted(path for path in folder.iterdir() if _is_image(path)):
        _, name = _numbered(stem_of(file), preset)
        if name := name or channel_named(stem_of(file), preset):
            case.add(name, file)
    if not case.files:
        return None
    return ChannelSources(folder.name, case.files, missing_channels(case.files, preset), case.problem)


def channel_named(text: str, preset: Preset) -> str | None:
    """The channel whose name or alias is among the words of a text; the longest match wins (t1_contrast, not t1)."""
    words = f"_{canonical_name(text)}_"
    fitting = [(len(name), c.name) for c in preset.channels for name in c.names() if f"_{name}_" in words]
    return max(fitting)[1] if fitting else None


def _numbered(stem: str, preset: Preset) -> tuple[str, str | None]:
    """The case and the channel that nnU-Net's suffix states; the channel is None without such a suffix."""
    match = NNUNET_SUFFIX.match(stem)
    if match is None or int(match["place"]) >= preset.in_channels:
        return stem, None
    return match["case"], preset.channels[int(match["place"])].name


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(ENDINGS) and not name.endswith(SEGMENTATION) and not name.startswith(".") and path.is_file()


def _shape_in(path: Path) -> Shape:
    try:
        return tuple(read_header(path).shape)
    except ImageError:
        return ()
