"""Cases of several sequences as a source: files or DICOM series in a folder, and the series of a study in a PACS."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.cluster.remote import Access, PacsSource
from lib.cluster.source import (
    Fetched,
    checksum_of,
    dicom_folders,
    is_image_file,
    name_problem,
    problem_of,
)
from lib.configs.preset import Preset, canonical_name
from lib.datastore.images.channel_series import SeriesCase, SeriesCases
from lib.datastore.images.folder import NOT_SCANNED, shown
from lib.datastore.images.sent_series import files_by_series, info_of
from lib.dicom.series import read_series
from lib.dicom.sources import SeriesInfo
from lib.dicom.volumes import write_volume
from lib.errors import ConfigError, ImageError
from lib.storage.files import sha256_of
from lib.transforms.channel_search import find_channel_sources
from lib.transforms.channels import ChannelSources

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeriesFiles:
    """A case whose channels are DICOM series.

    Attributes:
        files: channel name to the instances of its series.
        notes: notes for the user on the geometry of the series.
    """

    files: Mapping[str, Sequence[Path]]
    notes: tuple[str, ...] = ()


class ChannelFolder:
    """The cases of several sequences in a folder, which has the same path on all machines.

    The id of a case of files is their common name, or the name of their folder. The id of a case of DICOM series is the
    Series Instance UID of the display channel.

    Args:
        folder: folder to search.
        preset: a preset with channels.

    Raises:
        ConfigError: if the folder does not exist, or contains no case.
    """

    def __init__(self, folder: Path, preset: Preset) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--studies {str(folder)!r} is no folder")
        self._cases: dict[str, ChannelSources | SeriesFiles] = {}
        self._broken: dict[str, str] = {}
        self._find_files(folder.absolute(), preset)
        self._find_series(folder.absolute(), preset)
        if not self._cases and not self._broken:
            names = ", ".join(channel.name for channel in preset.channels)
            raise ConfigError(
                f"--studies {str(folder)!r} holds no case of several sequences; {preset.name!r} "
                f"needs the channels {names}"
            )

    def _find_files(self, folder: Path, preset: Preset) -> None:
        known: set[Path] = set()
        for sources in find_channel_sources(folder, preset, NOT_SCANNED):
            known |= set(sources.files.values())
            if problem := name_problem(sources.case_id) or _lack_of(sources):
                self._broken[shown(sources.case_id)] = problem
            else:
                self._cases[sources.case_id] = sources
        others = [path for path in sorted(folder.iterdir()) if path not in known and is_image_file(path)]
        for path in others:
            if problem := name_problem(path.name) or problem_of(path):
                self._broken[shown(path.name)] = problem
        if left_out := [path.name for path in others if shown(path.name) not in self._broken]:
            logger.warning("left out, no channel of a case of %r: %s", preset.name, ", ".join(left_out))

    def _find_series(self, folder: Path, preset: Preset) -> None:
        files: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and path.name.lower() not in NOT_SCANNED:
                for holding in dicom_folders(path, frozenset(), self._broken, folder):
                    try:
                        for uid, paths in files_by_series(holding).items():
                            files.setdefault(uid, []).extend(paths)
                    except ImageError as error:
                        self._broken[holding.relative_to(folder).as_posix()] = str(error)
        cases, broken = find_series_cases(preset, {uid: info_of(paths[0]) for uid, paths in files.items()})
        self._broken |= broken
        for case_id, case in cases.items():
            self._cases[case_id] = SeriesFiles({name: files[uid] for name, uid in case.series.items()}, case.notes)

    @property
    def broken(self) -> dict[str, str]:
        """See :class:`lib.cluster.source.CaseSource`: what such cases lack."""
        return self._broken

    def cases(self) -> list[str]:
        """See :class:`lib.cluster.source.CaseSource`."""
        return sorted(self._cases)

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """See :class:`lib.cluster.source.CaseSource`; it compares the checksums of all files."""
        return self._checksum(case) == sha256

    def fetch(self, case: str, folder: Path) -> Fetched:
        """See :class:`lib.cluster.source.CaseSource`; files stay in place, series are converted into ``folder``.

        Raises:
            ImageError: if a series is not a volume.
        """
        sources, sha256 = self._cases[case], self._checksum(case)
        if isinstance(sources, SeriesFiles):
            sources = convert_series(case, sources, folder)
        return Fetched(folder, sha256=sha256, channels=sources)

    def _checksum(self, case: str) -> str:
        sources = self._cases[case]
        try:
            if isinstance(sources, SeriesFiles):
                return _united(
                    {name: _united({f.name: sha256_of(f) for f in files}) for name, files in sources.files.items()}
                )
            if sources.stacked:
                return checksum_of(next(iter(sources.files.values())))
        except OSError as error:
            raise ImageError(f"case {case!r} cannot be read: {error.strerror or error}") from error
        return _united({name: checksum_of(file) for name, file in sources.files.items()})


class ChannelPacs:
    """Cases in a PACS of several series of one study; a case's id is the UID of its display channel's series.

    Args:
        url: root URL of the DICOMweb server.
        filters: see :class:`PacsSource`; series of a channel's own modality are searched too.
        access: see :class:`Access`.
        preset: a preset with channels.
    """

    def __init__(self, url: str, filters: Mapping[str, str], access: Access, preset: Preset) -> None:
        modalities = {*filters["Modality"].split("\\"), *(channel.series.Modality for channel in preset.channels)}
        self._series = PacsSource(url, {**filters, "Modality": "\\".join(sorted(modalities - {""}))}, access)
        self._preset = preset
        self._cases: dict[str, SeriesCase] = {}
        self._broken: dict[str, str] = {}

    @property
    def broken(self) -> dict[str, str]:
        """See :class:`lib.cluster.source.CaseSource`."""
        return self._broken

    def cases(self) -> list[str]:
        """See :class:`lib.cluster.source.CaseSource`.

        Raises:
            UpstreamError: if the server does not respond as a DICOMweb server.
        """
        self._cases, self._broken = find_series_cases(self._preset, self._series.infos())
        return sorted(self._cases)

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """See :class:`lib.cluster.source.CaseSource`; it compares the stamps of the series."""
        return bool(stamp) and self._stamp(case) == stamp

    def fetch(self, case: str, folder: Path) -> Fetched:
        """See :class:`lib.cluster.source.CaseSource`.

        Raises:
            NotFoundError, UpstreamError, ImageError: if a series is unavailable or is not a volume.
        """
        stamp, files = self._stamp(case), {}
        for channel, uid in self._cases[case].series.items():
            place = folder / canonical_name(channel)
            place.mkdir()
            self._series.fetch(uid, place)
            files[channel] = sorted(place.iterdir())
        sha256 = _united({name: _united({f.name: sha256_of(f) for f in paths}) for name, paths in files.items()})
        sources = convert_series(case, SeriesFiles(files, self._cases[case].notes), folder)
        return Fetched(folder, stamp, sha256, sources)

    def _stamp(self, case: str) -> str:
        return "-".join(self._series.stamp(uid) for _, uid in sorted(self._cases[case].series.items()))


def find_series_cases(preset: Preset, series: Mapping[str, SeriesInfo]) -> tuple[dict[str, SeriesCase], dict[str, str]]:
    """The cases among series, by the UID of the displayed series; and why others cannot be used."""
    by_series, cases, broken = SeriesCases([preset], series), {}, {}
    for uid in series:
        case = by_series.of(uid).get(preset.name)
        if case is None:
            continue
        if problem := _lack_of(ChannelSources(uid, {}, case.missing, case.problem)):
            broken[uid] = problem
        else:
            cases[uid] = case
    belonging = {other for case in cases.values() for other in case.series.values()}
    left_out = [uid for uid in series if uid not in belonging and uid not in broken]
    if left_out:
        logger.warning("left out, no channel of a case of %r: %d series", preset.name, len(left_out))
    return cases, broken


def _lack_of(sources: ChannelSources) -> str:
    """What a case lacks, or its problem; empty for nothing."""
    try:
        sources.check()
    except ImageError as error:
        return str(error)
    return ""


def convert_series(case: str, series: SeriesFiles, folder: Path) -> ChannelSources:
    """Write each channel's series as a NIfTI file into a folder.

    Raises:
        ImageError: if one is not a volume.
    """
    files = {}
    for channel, instances in series.files.items():
        files[channel] = folder / f"{canonical_name(channel)}.nii"
        write_volume(read_series(instances, f"channel {channel!r} of case {case!r}"), files[channel])
    return ChannelSources(case, files, notes=series.notes)


def _united(checksums: Mapping[str, str]) -> str:
    """One checksum of several, independent of their order."""
    lines = "".join(f"{name} {checksum}\n" for name, checksum in sorted(checksums.items()))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()
