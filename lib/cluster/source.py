"""Sources of cases, such as a folder, and the share of the cases that one of several workers processes."""

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
from lib.datastore.images.folder import shown
from lib.dicom.files import find_dicom, read_instance, reading
from lib.errors import ConfigError, ImageError
from lib.imagefiles.reading import read_header
from lib.storage.files import sha256_of
from lib.transforms.channels import ChannelSources, read_channels
from lib.transforms.inputs import read_input
from lib.transforms.intensity_range import warnings_of
from lib.transforms.volume import NIFTI_SUFFIXES, NRRD_SUFFIXES, Volume

logger = logging.getLogger(__name__)

LABELS_FOLDER = "labels"
NO_IMAGES = ("SEG", "RTDOSE")
"""Modalities of instances with pixels that are not images."""
LONGEST_NAME = 200
"""Longest name in bytes: file systems allow 255, and masks have a longer temporary name."""
NO_FILE = (
    "it is no file that can be read from its beginning to its end (a pipe, a device, or a link that leads nowhere)"
)


@dataclass(frozen=True)
class Shard:
    """One of ``count`` shares of the cases; ``number`` counts from 1.

    The share of a case depends on its id alone, so that it does not change when other cases are added.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse ``2/8``.

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
    """A case in memory, with the SHA-256 of its file or files, its stamp, and warnings."""

    case: str
    volume: Volume
    sha256: str
    stamp: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fetched:
    """An image on this machine.

    Attributes:
        path: a file, or a folder with one DICOM series.
        stamp: value that changes with the image; empty if only its content can be compared.
        sha256: checksum of the fetched data; if empty, that of ``path``.
        channels: the files of a case of several sequences, instead of ``path``.
    """

    path: Path
    stamp: str = ""
    sha256: str = ""
    channels: ChannelSources | None = None


class CaseSource(Protocol):
    """A source of cases. It is pickled, and used by several threads and machines."""

    @property
    def broken(self) -> dict[str, str]:
        """Reason by name for images that cannot be cases; available after the cases."""

    def cases(self) -> list[str]:
        """The sorted ids of all cases."""

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """Whether an image still has this checksum and stamp; the check is cheaper than reading it."""

    def fetch(self, case: str, folder: Path) -> Fetched:
        """The image; ``folder``, which is empty and temporary, may be used for it."""


@dataclass
class FoundImages:
    """The content of a folder.

    Attributes:
        images: case id to a file, or to a folder with the DICOM files of one case.
        broken: name of an image that cannot be a case to the reason.
        left_out: subfolders without an image.
    """

    images: dict[str, Path] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def find_images(folder: Path) -> FoundImages:
    """Each NIfTI and NRRD file of a folder, and each folder below it, at any depth, that contains DICOM images.

    The id of a nested folder is its path with ``_`` between the names. Hidden folders and ``labels`` are ignored.
    Images with the same id are reported as broken, since their masks would have the same name.

    Raises:
        ConfigError: if the folder does not exist, or is empty.
    """
    if not folder.is_dir():
        raise ConfigError(f"--studies {str(folder)!r} is no folder")
    listing = FoundImages()
    by_id: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() == LABELS_FOLDER:
            continue
        if path.is_dir():
            broken_before = len(listing.broken)
            images = list(dicom_folders(path, frozenset(), listing.broken, folder))
            if not images and len(listing.broken) == broken_before:
                listing.left_out.append(path.name)
            for image in images:
                name = "_".join(image.relative_to(folder).parts)
                if problem := name_problem(name):
                    listing.broken[shown(_below(image, folder))] = problem
                else:
                    by_id.setdefault(name, []).append(image)
        elif not is_image_file(path):
            continue
        elif problem := name_problem(path.name) or ("" if path.is_file() else NO_FILE):
            listing.broken[shown(path.name)] = problem
        else:
            by_id.setdefault(case_id(path), []).append(path)
    for name, paths in sorted(by_id.items()):
        if len(paths) == 1:
            listing.images[name] = paths[0]
            continue
        for path in paths:
            others = ", ".join(repr(_below(other, folder)) for other in paths if other != path)
            listing.broken[_below(path, folder)] = f"{others} would have the same id {name!r}; rename one of them"
    if listing.left_out:
        logger.warning("left out, without a DICOM image: %s", ", ".join(f"{name}/" for name in listing.left_out))
    if not listing.images and not listing.broken:
        raise ConfigError(f"--studies {str(folder)!r} holds no NIfTI or NRRD file, and no folder of DICOM files")
    return listing


def dicom_folders(folder: Path, above: frozenset[Path], broken: dict[str, str], top: Path) -> Iterator[Path]:
    """The folder and those below it that contain DICOM images; one that cannot be read is added to ``broken``."""
    real = folder.resolve()
    if real in above:  # a link to an enclosing folder
        return
    try:
        if any(_is_image_instance(file) for file in find_dicom(folder)):
            yield folder
        nested = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        broken[_below(folder, top)] = f"folder {folder.name!r} cannot be read: {error.strerror or error}"
        return
    for path in nested:
        yield from dicom_folders(path, above | {real}, broken, top)


def _is_image_instance(file: Path) -> bool:
    """Whether a DICOM file has pixels of an image; a damaged one counts too, so that it is reported."""
    try:
        with reading("it cannot be read"):
            header = read_instance(file, with_pixels=False)
    except ImageError:
        return True
    return "Rows" in header and str(header.get("Modality", "")) not in NO_IMAGES


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def is_image_file(path: Path) -> bool:
    """Whether a name is that of an image in a single file."""
    visible = not path.name.startswith(".") and not path.is_dir()
    return visible and path.name.endswith((*NIFTI_SUFFIXES, *NRRD_SUFFIXES)) and not path.name.endswith(".seg.nrrd")


def name_problem(name: str) -> str:
    """Why an image's name cannot be used for its mask and record; empty if it can."""
    if shown(name) != name:
        return "its name is not UTF-8; rename it"
    if not name.isprintable():
        return "its name has a character that is none, such as a line break; rename it"
    if len(name.encode("utf-8")) > LONGEST_NAME:
        return f"its name is longer than {LONGEST_NAME} bytes; rename it"
    return ""


def problem_of(path: Path) -> str:
    """Why a file's header cannot be read; empty if it can."""
    if not path.is_file():
        return NO_FILE
    try:
        read_header(path)
    except ImageError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return ""


def checksum_of(path: Path) -> str:
    """SHA-256 of a file; for a folder, of the names and checksums of its files (without subfolders).

    Raises:
        ImageError: if it cannot be read.
    """
    try:
        if not path.is_dir():
            return sha256_of(path)
        files = sorted(file for file in path.iterdir() if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n" for file in files]
    except OSError as error:
        raise ImageError(f"image {path.name!r} cannot be read: {error.strerror or error}") from error
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def read_case(case: str, fetched: Fetched, preset: Preset) -> ReadCase:
    """Read an image as input of a preset's network.

    Raises:
        ImageError: if it cannot be read.
    """
    try:
        sha256 = fetched.sha256 or checksum_of(fetched.path)
        channels = fetched.channels
        volume = read_input(fetched.path, preset) if channels is None else read_channels(channels, preset)
    except OSError as error:
        raise ImageError(f"image {case!r} cannot be read: {error.strerror or error}") from error
    return ReadCase(case, volume, sha256, fetched.stamp, warnings_of(volume, preset))


class FolderSource:
    """The images of a folder, which has the same path on all machines.

    Args:
        folder: folder for :func:`find_images`.
    """

    def __init__(self, folder: Path) -> None:
        listing = find_images(folder.absolute())
        self._images, self._broken = listing.images, listing.broken

    @property
    def broken(self) -> dict[str, str]:
        """See :class:`CaseSource`."""
        return self._broken

    def cases(self) -> list[str]:
        """See :class:`CaseSource`."""
        return list(self._images)

    def is_unchanged(self, case: str, sha256: str, stamp: str) -> bool:
        """See :class:`CaseSource`; it compares the checksum."""
        return checksum_of(self._images[case]) == sha256

    def fetch(self, case: str, folder: Path) -> Fetched:
        """See :class:`CaseSource`; the image stays in place."""
        return Fetched(self._images[case])
