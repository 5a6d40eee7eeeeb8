"""Checks labels that were copied into ``labels/final``, and describes the problems of invalid ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib.configs.preset import Preset
from lib.datastore.images.folder import NOT_SCANNED
from lib.datastore.label_files.label_file import read_segments
from lib.datastore.records import FINAL, Submission
from lib.datastore.validation import check_label
from lib.errors import FileKindError, ImageError, LabelError
from lib.transforms.channel_search import find_channel_sources
from lib.transforms.channels import read_channels
from lib.transforms.volume import Grid, read_grid

ACCEPTED_SUFFIXES = (".seg.nrrd", ".nii.gz", ".nii", ".nrrd")
"""Extensions of label files, in any case, longer ones first."""
FOLDER = f"labels/{FINAL}"


@dataclass(frozen=True)
class Problem:
    """A file of the studies that is not used.

    Attributes:
        file: its path relative to the studies.
        reason: the problem, as a sentence.
    """

    file: str
    reason: str


@dataclass(frozen=True)
class FoundLabel:
    """A valid label.

    Attributes:
        file: the file that was found.
        kept: the file in the form in which labels are stored; ``file`` itself if it has that form.
        submission: its description.
    """

    file: Path
    kept: Path
    submission: Submission


def label_id(name: str) -> str | None:
    """The id of the image to which a label file belongs, by its name; None for other kinds of files.

    >>> label_id("case_7.seg.nrrd"), label_id("case_7.NII.GZ"), label_id("notes.txt")
    ('case_7', 'case_7', None)
    """
    suffix = next((suffix for suffix in ACCEPTED_SUFFIXES if name.lower().endswith(suffix)), None)
    return name[: -len(suffix)] or None if suffix else None


def label_files(folder: Path) -> list[Path]:
    """The labels in a folder, oldest first, so that of two labels for one image the newer one is used."""
    aged = [
        (age, path.name, path)
        for path in _files(folder)
        if label_id(path.name) is not None and (age := _time_of(path)) is not None
    ]
    return [path for _, _, path in sorted(aged)]


def stray_files(folder: Path, images: Mapping[str, object] | set[str]) -> list[Problem]:
    """Files in a folder of labels that are not labels, or that belong to no image."""
    problems = []
    for path in sorted(_files(folder)):
        image = label_id(path.name)
        if image is None:
            kinds = ", ".join(ACCEPTED_SUFFIXES)
            problems.append(
                Problem(f"{FOLDER}/{path.name}", f"it is of a kind that labels do not have; valid: {kinds}")
            )
        elif image not in images:
            problems.append(Problem(f"{FOLDER}/{path.name}", f"there is no image {image!r}"))
    return problems


def check_label_file(file: Path, image: Grid, known: Submission, presets: Sequence[Preset], folder: Path) -> FoundLabel:
    """Check a label like a submitted one, for its known preset or otherwise for all presets.

    Labels without voxels count as absent in the image, since files in this folder are finished segmentations.

    Args:
        file: the label file.
        image: its image's grid.
        known: its description, as far as known.
        presets: the presets.
        folder: for new files.

    Raises:
        LabelError: if it matches none of the presets, with the reason for each.
    """
    named = [preset for preset in presets if preset.name == known.preset]
    info = {key: known.info[key] for key in ("label_info", "missing_labels") if key in known.info} | {"complete": True}
    reasons, original = [], file
    if file.name != _readable_name(file.name):
        file = Path(shutil.copyfile(file, folder / _readable_name(file.name)))
    for preset in named or presets:
        try:
            checked = check_label(file, image, preset, info, _own_folder(folder, preset))
        except (LabelError, FileKindError) as error:
            reasons.append((preset.name, str(error)))
            continue
        submission = replace(known, notes=checked.notes)
        if info.get("label_info") or read_segments(file):
            submission = replace(submission, preset=preset.name, label_map=checked.mapped.label_map)
        return FoundLabel(original, checked.file, submission)
    same = len({reason for _, reason in reasons}) == 1
    raise LabelError(reasons[0][1] if same else "; ".join(f"as {name}: {reason}" for name, reason in reasons))


def fingerprint(presets: Sequence[Preset]) -> str:
    """A value that changes when a refused label might become valid."""
    labels = {preset.name: [[*sorted(label.names()), label.index] for label in preset.labels] for preset in presets}
    return hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()[:16]


def find_problems(studies: Path, presets: Sequence[Preset], folder: Path) -> Iterator[Problem]:
    """All problems of the labels of a studies folder; nothing in it is changed.

    Args:
        studies: folder with the images and ``labels/final``.
        presets: the presets of the labels.
        folder: for temporary files.
    """
    labels = studies / FOLDER
    images = {label_id(path.name): path for path in _files(studies) if label_id(path.name)}
    images = {image: path for image, path in images.items() if image is not None}
    cases = {
        sources.case_id: (sources, preset)
        for preset in reversed(presets)  # the first matching preset defines the display channel
        for sources in (find_channel_sources(studies, preset, NOT_SCANNED) if preset.channels else ())
    }
    yield from stray_files(labels, {*(image for image in images if image is not None), *cases})
    for file in label_files(labels):
        name = str(label_id(file.name))
        image = images.get(name)
        if image is None and name not in cases:
            continue
        try:
            grid = read_grid(image) if image is not None and name not in cases else read_channels(*cases[name]).grid
            check_label_file(file, grid, Submission(image_id=name), presets, folder)
        except ImageError as error:
            yield Problem(f"{FOLDER}/{file.name}", f"it cannot be held against its image: {error}")
        except LabelError as error:
            yield Problem(f"{FOLDER}/{file.name}", str(error))


def _time_of(path: Path) -> int | None:
    """When a file was written; None for one that has been removed meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."] if folder.is_dir() else []


def _readable_name(name: str) -> str:
    """A name with its extension in lower case, as nibabel requires."""
    image = label_id(name) or name
    return image + name[len(image) :].lower()


def _own_folder(folder: Path, preset: Preset) -> Path:
    own = folder / preset.name
    own.mkdir(exist_ok=True)
    return own
