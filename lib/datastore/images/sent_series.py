"""Converts several DICOM series that a client sends as one case into a NIfTI file for each channel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from lib.configs.preset import Preset, canonical_name
from lib.datastore.images.channel_series import SeriesCases
from lib.dicom.attributes import to_json
from lib.dicom.files import find_dicom, read_instance, reading
from lib.dicom.series import read_series
from lib.dicom.sources import SeriesInfo, series_info
from lib.dicom.volumes import write_volume
from lib.errors import ImageError


def unite_series(received: Path, target: Path, presets: Collection[Preset]) -> tuple[Path, tuple[str, ...]]:
    """Convert the channels of the case in a folder of DICOM files.

    Args:
        received: the folder, or a single file.
        target: path of the new folder of files named by channel.
        presets: the served presets.

    Returns:
        ``target``, or ``received`` if it holds one series or if no preset has channels; and notes for the user on the
        geometry of the series.

    Raises:
        ImageError: if the series are not a case of any preset, or if one cannot be read.
    """
    taking = [preset for preset in presets if preset.channels]
    files = files_by_series(received) if taking and received.is_dir() else {}
    if len(files) < 2:
        return received, ()
    infos = {uid: info_of(paths[0]) for uid, paths in files.items()}
    cases = SeriesCases(taking, infos)
    shown = [uid for uid in files if cases.of(uid)]
    if not shown:
        described = ", ".join(repr(info.attributes["SeriesDescription"]) for info in infos.values())
        wanted = " or ".join(sorted({p.channels[p.display_channel].name for p in taking}))
        raise ImageError(f"none of the {len(files)} series is the channel {wanted}: {described}")
    case = next(iter(cases.of(shown[0]).values()))
    if case.problem:
        raise ImageError(f"what was sent {case.problem}")
    target.mkdir()
    for channel, uid in case.series.items():
        write_volume(read_series(files[uid], f"series {uid}"), target / f"{canonical_name(channel)}.nii")
    return target, case.notes


def files_by_series(folder: Path) -> dict[str, list[Path]]:
    """The DICOM files of a folder, by their Series Instance UID.

    Raises:
        ImageError: if one cannot be read.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    for file in find_dicom(folder):
        with reading(f"{file.name!r} cannot be read"):
            files[str(read_instance(file, with_pixels=False).get("SeriesInstanceUID", ""))].append(file)
    return dict(files)


def info_of(file: Path) -> SeriesInfo:
    """The series information in a file.

    Raises:
        ImageError: if it cannot be read.
    """
    with reading(f"{file.name!r} cannot be read"):
        return series_info(to_json(read_instance(file, with_pixels=False)))
