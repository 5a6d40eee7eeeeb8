"""Where cases come from, a folder among others, and the share of them that one of several workers takes."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lib.cases.labelled import case_id
from lib.configs.preset import Preset
from lib.dicom.files import find_dicom, read_instance, reading
from lib.errors import ConfigError, ImageError
from lib.storage.files import sha256_of
from lib.transforms.inputs import read_input
from lib.transforms.volume import NIFTI_SUFFIXES, NRRD_SUFFIXES, Volume

logger = logging.getLogger(__name__)

LABELS_FOLDER = "labels"
NO_IMAGES = ("SEG", "RTDOSE")
"""Modalities whose instances have pixels, but of no image."""


@dataclass(frozen=True)
class Shard:
    """One of ``count`` shares of the cases; ``number`` counts from 1.

    A case's share follows from its id alone, so that it stays the same when other cases are added.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/8``.

        Raises:
            ConfigError: for anything else than a number from 1 to the count.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        shard = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= shard.number <= shard.count:
            raise ConfigError(f"--shard {text!r}; valid: K/N with K from 1 to N, as 2/8")
        return shard

    def __contains__(self, name: str) -> bool:
        value = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")
        return value % self.count == self.number - 1


@dataclass(frozen=True)
class ReadCase:
    """A case that is in memory, with the SHA-256 of its file or of its folder's files, and its stamp."""

    case: str
    volume: Volume
    sha256: str
    stamp: str = ""


@dataclass(frozen=True)
class Fetched:
    """An image on this machine.

    Attributes:
        path: a file, or a folder of one DICOM series.
        stamp: changes with the image; empty where only its content tells.
    """

    path: Path
    stamp: str = ""


class CaseSource(Protocol):
    """Where cases come from. It is pickled, and asked from several threads and machines."""

    @property
    def broken(self) -> dict[str, str]:
        """Name of an image that cannot be a case, to the reason; known once the cases are."""

    def cases(self) -> list[str]:
        """The ids of all cases, in order."""

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """Whether an image is still the one of that checksum and stamp; what it costs is less than to read it."""

    def fetch(self, case: str, folder: Path) -> Fetched:
        """The image; ``folder``, which is empty and soon gone, may be used for it."""


@dataclass
class FoundImages:
    """What a folder holds.

    Attributes:
        images: case id to a file, or to a folder whose DICOM files are one case.
        broken: name of an image that cannot be a case, to the reason.
        left_out: sub-folders without an image.
    """

    images: dict[str, Path] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def find_images(folder: Path) -> FoundImages:
    """Each NIfTI and NRRD file of a folder, and each folder in it, however deep, that has DICOM images of its own.

    The id of a nested folder is its path with ``_`` between the names. Hidden folders and ``labels`` are not looked at.
    Images that would have the same id are broken, since their masks would have one name.

    Raises:
        ConfigError: when there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"--studies {str(folder)!r} is no folder")
    found = FoundImages()
    by_id: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() == LABELS_FOLDER:
            continue
        if path.is_dir():
            broken_before = len(found.broken)
            images = list(_dicom_folders(path, frozenset(), found.broken, folder))
            if not images and len(found.broken) == broken_before:
                found.left_out.append(path.name)
            for image in images:
                by_id.setdefault("_".join(image.relative_to(folder).parts), []).append(image)
        elif _is_image_file(path.name):
            by_id.setdefault(case_id(path), []).append(path)
    for name, paths in sorted(by_id.items()):
        if len(paths) == 1:
            found.images[name] = paths[0]
            continue
        for path in paths:
            others = ", ".join(repr(_below(other, folder)) for other in paths if other != path)
            found.broken[_below(path, folder)] = f"{others} would have the same id {name!r}; rename one of them"
    if found.left_out:
        logger.warning("left out, without a DICOM image: %s", ", ".join(f"{name}/" for name in found.left_out))
    if not found.images and not found.broken:
        raise ConfigError(f"--studies {str(folder)!r} holds no NIfTI or NRRD file, and no folder of DICOM files")
    return found


def _dicom_folders(folder: Path, above: frozenset[Path], broken: dict[str, str], top: Path) -> Iterator[Path]:
    """The folder and those below it that have DICOM images of their own; one that cannot be read becomes broken."""
    real = folder.resolve()
    if real in above:  # a link to a folder that it lies in
        return
    try:
        if any(_is_image_instance(file) for file in find_dicom(folder)):
            yield folder
        nested = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        broken[_below(folder, top)] = f"folder {folder.name!r} cannot be read: {error.strerror or error}"
        return
    for path in nested:
        yield from _dicom_folders(path, above | {real}, broken, top)


def _is_image_instance(file: Path) -> bool:
    """Whether a DICOM file has pixels of an image; a damaged one counts, so that it is reported."""
    try:
        with reading("it cannot be read"):
            header = read_instance(file, with_pixels=False)
    except ImageError:
        return True
    return "Rows" in header and str(header.get("Modality", "")) not in NO_IMAGES


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _is_image_file(name: str) -> bool:
    return name.endswith((*NIFTI_SUFFIXES, *NRRD_SUFFIXES)) and not name.endswith(".seg.nrrd")


def checksum_of(path: Path) -> str:
    """SHA-256 of a file; of a folder, of the names and checksums of the files in it (not below it).

    Raises:
        ImageError: when it cannot be read.
    """
    try:
        if not path.is_dir():
            return sha256_of(path)
        files = sorted(file for file in path.iterdir() if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n" for file in files]
    except OSError as error:
        raise ImageError(f"image {path.name!r} cannot be read: {error.strerror or error}") from error
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def read_case(case: str, path: Path, sha256: str, preset: Preset, stamp: str = "") -> ReadCase:
    """Read what a preset's network takes of an image whose checksum is known.

    Raises:
        ImageError: when it cannot be read.
    """
    try:
        return ReadCase(case, read_input(path, preset), sha256, stamp)
    except OSError as error:
        raise ImageError(f"image {path.name!r} cannot be read: {error.strerror or error}") from error


class FolderSource:
    """The images of a folder, which has the same path on all machines.

    Args:
        folder: where :func:`find_images` looks.
    """

    def __init__(self, folder: Path) -> None:
        found = find_images(folder.absolute())
        self._images, self._broken = found.images, found.broken

    @property
    def broken(self) -> dict[str, str]:
        """As :class:`CaseSource`."""
        return self._broken

    def cases(self) -> list[str]:
        """As :class:`CaseSource`."""
        return list(self._images)

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """As :class:`CaseSource`; by its checksum."""
        return checksum_of(self._images[case]) == sha256

    def fetch(self, case: str, folder: Path) -> Fetched:
        """As :class:`CaseSource`; it stays where it is."""
        return Fetched(self._images[case])
