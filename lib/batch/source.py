"""The cases of a folder, and the share of them that one of several workers takes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lib.cases.labelled import case_id
from lib.errors import ConfigError, ImageError
from lib.storage.files import sha256_of
from lib.transforms.volume import NIFTI_SUFFIXES, NRRD_SUFFIXES, Volume, read_volume

LABELS_FOLDER = "labels"


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
    """A case that is in memory, with the SHA-256 of its file or of its folder's files."""

    volume: Volume
    sha256: str


def find_images(folder: Path) -> dict[str, Path]:
    """Case id to file of each NIfTI and NRRD file of a folder, and to each sub-folder but ``labels``, in order of ids.

    Raises:
        ConfigError: when there is no such folder, nothing in it, or two images of one id.
    """
    if not folder.is_dir():
        raise ConfigError(f"--studies {str(folder)!r} is no folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() == LABELS_FOLDER or not _is_image(path):
            continue
        name = case_id(path)
        if name in found:
            raise ConfigError(f"{found[name].name!r} and {path.name!r} have the same id {name!r}; rename one of them")
        found[name] = path
    if not found:
        raise ConfigError(f"--studies {str(folder)!r} holds no NIfTI or NRRD file, and no folder of DICOM files")
    return found


def _is_image(path: Path) -> bool:
    name = path.name
    return path.is_dir() or (name.endswith((*NIFTI_SUFFIXES, *NRRD_SUFFIXES)) and not name.endswith(".seg.nrrd"))


def checksum_of(path: Path) -> str:
    """SHA-256 of a file; of a folder, of the names and checksums of its files.

    Raises:
        ImageError: when it cannot be read.
    """
    try:
        if not path.is_dir():
            return sha256_of(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n" for file in files]
    except OSError as error:
        raise ImageError(f"image {path.name!r} cannot be read: {error.strerror or error}") from error
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def read_case(path: Path, sha256: str) -> ReadCase:
    """Read an image whose checksum is known.

    Raises:
        ImageError: when it cannot be read.
    """
    try:
        return ReadCase(read_volume(path), sha256)
    except OSError as error:
        raise ImageError(f"image {path.name!r} cannot be read: {error.strerror or error}") from error
