"""Lists the images of a studies folder, and the files there that look like images but cannot be used, with the
reasons.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HIDDEN = ".dicom"
"""Folder of the index and of converted series, next to the labels."""
NOT_SCANNED = ("labels", "history", "references")
"""Folders next to the images that are not searched for images."""
OTHER_KINDS = (".nhdr", ".mha", ".mhd", ".hdr", ".img", ".nii.bz2", ".nii.zst", ".mgz")
"""Extensions of image formats that are not supported."""
SEGMENTATION = ".seg.nrrd"
MOST_ENTRIES = 50_000
"""Largest number of files in subfolders that are examined, so that a large DICOM archive is not scanned at each
change.
"""
MOST_PROBLEMS = 200


@dataclass(frozen=True)
class FolderProblem:
    """A file or subfolder that cannot be used as a case.

    Attributes:
        name: name of the file or subfolder; characters that cannot be displayed are escaped.
        reason: why it cannot be used, and what to do about it.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class FolderListing:
    """The content of a folder.

    Attributes:
        images: id to extension of the file, as written.
        problems: files and subfolders that cannot be used.
    """

    images: dict[str, str]
    problems: tuple[FolderProblem, ...]


def list_images(folder: Path, endings: Sequence[str], taken: Collection[Path] = ()) -> FolderListing:
    """The images directly in a folder.

    Of two files with the same id, the image is the one whose extension comes first in ``endings``, whichever file is
    older. Of two extensions that differ only in case, the one in lower case wins.

    Args:
        folder: the folder.
        endings: extensions of image files, such as ``.nii.gz``, in order of preference.
        taken: files that belong to cases of several sequences and are not images of their own.
    """
    endings_of: dict[str, list[str]] = {}
    problems: list[FolderProblem] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if Path(entry.path) in taken:
            continue
        problem = _problem_of(entry, endings)
        if problem:
            problems.append(FolderProblem(shown(entry.name), problem))
        elif not entry.name.startswith(".") and (ending := ending_of(entry.name, endings)) and _is_file(entry):
            endings_of.setdefault(entry.name[: -len(ending)], []).append(ending)
    for image_id, several in endings_of.items():
        several.sort(key=lambda ending: (endings.index(ending.lower()), ending != ending.lower(), ending))
        problems += [
            FolderProblem(
                image_id + ending, f"has the same id as {image_id + several[0]!r}, which is the case; rename it"
            )
            for ending in several[1:]
        ]
    of_cases = {path.parent.name for path in taken if path.parent != folder}
    problems += _in_sub_folders(folder, endings, of_cases)
    images = {image_id: several[0] for image_id, several in endings_of.items()}
    return FolderListing(images, tuple(problems[:MOST_PROBLEMS]))


def ending_of(name: str, endings: Collection[str]) -> str:
    """The longest matching extension of a file name, as written; empty for none, and if nothing precedes it.

    >>> ending_of("b.nii.gz.NII.GZ", (".nii", ".nii.gz"))
    '.NII.GZ'
    """
    lower = name.lower()
    fitting = [ending for ending in endings if lower.endswith(ending) and len(name) > len(ending)]
    return name[-len(max(fitting, key=len)) :] if fitting else ""


def shown(name: str) -> str:
    """A file's name as text that every client can be sent, with what is no UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def _problem_of(entry: os.DirEntry[str], endings: Sequence[str]) -> str:
    """Why a directory entry that looks like an image cannot be used; empty if it can."""
    name = entry.name.lower()
    kind = ending_of(name, (*endings, *OTHER_KINDS))
    if name.startswith(".") or not kind or (_is_folder(entry) and kind not in endings):
        return ""
    if shown(entry.name) != entry.name:
        return "its name is not UTF-8; rename it"
    if not _is_file(entry):
        return "is no regular file, though it is named as an image"
    if name.endswith(SEGMENTATION):
        image_id = entry.name[: -len(SEGMENTATION)]
        return f"is a segmentation, not an image; a label belongs into labels/final, as {image_id}.nrrd"
    if kind not in endings:
        return f"is of a kind that is not read from a folder; valid: {', '.join(endings)}"
    return ""


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file, or a link to one; False if the link is circular."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _in_sub_folders(folder: Path, endings: Sequence[str], of_cases: Collection[str]) -> Iterator[FolderProblem]:
    """A problem for each subfolder that contains images but is not a case of several sequences."""
    left = MOST_ENTRIES
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        hidden = (HIDDEN, *NOT_SCANNED, *of_cases) if place == str(folder) else ()
        folders[:] = sorted(name for name in folders if name not in hidden and not name.startswith("."))
        if place == str(folder):
            continue
        images = sorted(name for name in files if not name.startswith(".") and ending_of(name, endings))
        if images:
            count = "an image lies" if len(images) == 1 else f"{len(images)} images lie"
            reason = f"{count} in a sub-folder and cannot be seen, such as {shown(images[0])!r}; move them up"
            yield FolderProblem(f"{shown(inside.as_posix())}/", reason)
        left -= len(files)
        if left < 0:
            return
