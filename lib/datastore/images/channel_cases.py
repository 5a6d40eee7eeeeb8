"""The cases of several sequences in a studies folder, and the image that represents each case.

Viewers, labels and masks refer to one image for each case: that of the display channel. It is in a hidden folder under
the case's id, as a link to the channel's file or, for a 4D file, as a separate file. A record next to it lists the
files of the other channels (:mod:`lib.transforms.channels`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from lib.configs.preset import Preset
from lib.datastore.images.folder import HIDDEN, NOT_SCANNED, FolderProblem, ending_of, shown
from lib.imagefiles.compression import pack_gzip
from lib.storage.files import replacing
from lib.transforms.channel_search import ENDINGS, KnownShapes, find_channel_sources
from lib.transforms.channels import ChannelSources, read_channels, read_stamp, record_of, write_sources

FOLDER = "channels"
EXTRACTED = ".nii.gz"

ByPreset = Mapping[str, ChannelSources]


@dataclass(frozen=True)
class ShownChannel:
    """The display channel of a case.

    Attributes:
        preset: the preset that defines it.
        file: file of the channel.
        stacked: whether the file holds other channels too.
    """

    preset: Preset
    file: Path
    stacked: bool

    @property
    def ending(self) -> str:
        """Extension of the image that represents the case."""
        return EXTRACTED if self.stacked else ending_of(self.file.name, ENDINGS)


class ChannelCases:
    """The cases of several sequences of one folder.

    Args:
        place: hidden folder for the images that represent cases.
        presets: the served presets; of those with channels, the first that matches a case defines its display channel.
    """

    def __init__(self, place: Path, presets: Sequence[Preset] = ()) -> None:
        self.presets = tuple(preset for preset in presets if preset.channels)
        self._place = place / FOLDER
        self._shapes = KnownShapes()
        self._cases: dict[str, ByPreset] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def __contains__(self, case_id: str) -> bool:
        return case_id in self._cases

    def endings(self) -> dict[str, str]:
        """Case id to the extension of the image that represents it."""
        return {case_id: self._shown(by_preset).ending for case_id, by_preset in self._cases.items()}

    def update(
        self, folder: Path, refusal: Callable[[Path], str | None]
    ) -> tuple[frozenset[Path], list[FolderProblem]]:
        """Search the folder for cases again.

        Args:
            folder: the studies.
            refusal: returns why a file must not be read; None if it may be.

        Returns:
            The files that belong to cases, and the problems of files that look like a case but cannot be used.
        """
        by_case: dict[str, dict[str, ChannelSources]] = defaultdict(dict)
        for preset in self.presets:
            for sources in find_channel_sources(folder, preset, (HIDDEN, *NOT_SCANNED), self._shapes):
                by_case[sources.case_id][preset.name] = sources
        cases: dict[str, ByPreset] = {}
        problems = []
        for case_id, by_preset in by_case.items():
            if problem := self._problem_of(case_id, by_preset, refusal):
                problems.append(FolderProblem(shown(case_id), problem))
            else:
                cases[case_id] = by_preset
        self._cases = cases
        return frozenset(path for one in by_case.values() for path in _files(one)), problems

    def file(self, case_id: str) -> Path:
        """The image that represents a case, whether or not it has been made."""
        return self._place / f"{case_id}{self._shown(self._cases[case_id]).ending}"

    def files(self, case_id: str) -> list[Path]:
        """The files of a case, sorted."""
        return _files(self._cases[case_id])

    def stamp(self, case_id: str) -> str:
        """A value that changes with the files of a case, or when another file becomes a channel; "" for no case."""
        by_preset = self._cases[case_id]
        digest = hashlib.sha256(repr(sorted(by_preset.items())).encode())
        try:
            for path in _files(by_preset):
                status = path.stat()
                digest.update(f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        except FileNotFoundError:
            return ""
        return digest.hexdigest()[:16]

    def get(self, case_id: str) -> Path:
        """The image that represents a case, made if necessary, with the record of all channels next to it.

        Raises:
            ImageError: if a 4D file cannot be read.
        """
        file, stamp, by_preset = self.file(case_id), self.stamp(case_id), self._cases[case_id]
        with self._locks[case_id]:
            if not file.exists() or read_stamp(file) != stamp:
                self._place.mkdir(parents=True, exist_ok=True)
                self._make(file, self._shown(by_preset), by_preset)
                self._write_down(file, stamp, by_preset)
        return file

    def forget(self, case_id: str) -> None:
        """Remove the files that were made for a case."""
        file = self.file(case_id)
        file.unlink(missing_ok=True)
        record_of(file).unlink(missing_ok=True)
        self._cases.pop(case_id, None)

    def _make(self, file: Path, channel: ShownChannel, by_preset: ByPreset) -> None:
        if not channel.stacked:
            partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
            partial.unlink(missing_ok=True)
            partial.symlink_to(channel.file.absolute())
            os.replace(partial, file)
            return
        volume = read_channels(by_preset[channel.preset.name], channel.preset)
        image = nib.Nifti1Image(np.asarray(volume.voxels), volume.affine_ras)
        image.header.set_xyzt_units("mm")
        with replacing(file) as out:
            out.write(pack_gzip(image.to_bytes()))

    def _write_down(self, file: Path, stamp: str, by_preset: ByPreset) -> None:
        channel = self._shown(by_preset)
        on_shown = {name: one if one.stacked else replace(one, shown=channel.file) for name, one in by_preset.items()}
        write_sources(file, on_shown, stamp)

    def _shown(self, by_preset: ByPreset) -> ShownChannel:
        channel = self._find_shown(by_preset)
        assert channel is not None  # a case without a display channel has a problem
        return channel

    def _find_shown(self, by_preset: ByPreset) -> ShownChannel | None:
        for preset in self.presets:
            sources = by_preset.get(preset.name)
            file = None if sources is None else sources.files.get(preset.channels[preset.display_channel].name)
            if sources is not None and file is not None:
                return ShownChannel(preset, file, sources.stacked)
        return None

    def _problem_of(self, case_id: str, by_preset: ByPreset, refusal: Callable[[Path], str | None]) -> str:
        """Why files that look like a case cannot be used as one; empty if they can."""
        if shown(case_id) != case_id:
            return "its name is not UTF-8; rename it"
        if self._find_shown(by_preset) is None:
            shown_by = {p.channels[p.display_channel].name for p in self.presets if p.name in by_preset}
            there = ", ".join(path.name for path in _files(by_preset))
            return f"lacks the channel {' or '.join(sorted(shown_by))}, which is shown and labelled; there is {there}"
        refused = [f"its file {path.name!r} {why}" for path in _files(by_preset) if (why := refusal(path)) is not None]
        return refused[0] if refused else ""


def _files(by_preset: ByPreset) -> list[Path]:
    return sorted({path for sources in by_preset.values() for path in sources.files.values()})
