"""The records of a submitted label."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lib.storage.json_files import read_json

FINAL, ORIGINAL = "final", "original"
INFERENCE = "inference"
"""Source of a label that a model computed."""
LONGEST_NAME_IN_FILE = 150
VERSIONS_A_FOLDER = 1000
LABEL_SUFFIXES = (".nii.gz", ".nii", ".nrrd")


@dataclass(frozen=True)
class Submission:
    """A label that is to be stored.

    Attributes:
        image_id: the image that it belongs to.
        tag: ``final``, ``original`` or a tag of the client's own.
        user: the sender, as authenticated by the server.
        client_id: name by which the client identifies itself.
        preset: the preset of its label names.
        model_version: version of the prediction from which it started; empty if unknown.
        engine: engine that computed that prediction; empty if unknown.
        label_map: name to value in the file.
        missing_labels: labels of the preset that it does not annotate.
        voxels_changed: number of voxels that differ from that prediction; None if unknown.
        prompts_used: number of prompts to interactive models for it; None if unknown.
        seconds_spent: time from the hand-out of the case to its submission; None without a hand-out.
        restored_from: id of the version of which it is a copy.
        source: origin, such as ``rest``, ``dicom`` or ``inference``.
        notes: changes on import, as sentences.
        info: additional information from the client.
    """

    image_id: str
    tag: str = FINAL
    user: str = ""
    client_id: str = ""
    preset: str = ""
    model_version: str = ""
    engine: str = ""
    label_map: Mapping[str, int] = field(default_factory=dict)
    missing_labels: tuple[str, ...] = ()
    voxels_changed: int | None = None
    prompts_used: int | None = None
    seconds_spent: float | None = None
    restored_from: str | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MadeMask:
    """A model's mask of an image, computed on another machine.

    Attributes:
        image_id: id of the image.
        mask: path of a ``.nii.gz``.
        params: the JSON of the corresponding inference response.
        problem: why there is no mask.
    """

    image_id: str
    mask: bytes = b""
    params: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class LabelVersion(Submission):
    """A stored label, which is immutable.

    Attributes:
        sequence: number that grows by one with each version of the store.
        version_id: its unique id.
        file: file of the mask.
        size: size of the file in bytes.
        sha256: SHA-256 of the file, in hexadecimal.
        saved_at: time in ISO 8601, UTC.
        sent_file: name of the original file, in ``history/sent``; empty if it is the mask's file itself.
        sent_sha256: SHA-256 of the original file.
    """

    sequence: int = 0
    version_id: str = ""
    file: Path = Path()
    size: int = 0
    sha256: str = ""
    saved_at: str = ""
    sent_file: str = ""
    sent_sha256: str = ""

    @property
    def suffix(self) -> str:
        """The extension of the mask's file."""
        return suffix_of(self.file)

    @property
    def is_drawn(self) -> bool:
        """Whether a person drew or chose it; stock MONAI Label stores predictions in ``labels/original``."""
        return is_drawn(self.source, self.tag)

    def describe(self) -> dict[str, Any]:
        """The version as JSON data for a client, without the server's paths."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return (
            data
            | {"label_map": dict(self.label_map), "info": dict(self.info)}
            | {"file": self.file.name, "missing_labels": list(self.missing_labels), "notes": list(self.notes)}
        )


def is_drawn(source: str, tag: str) -> bool:
    """Whether a label that came by ``source`` was drawn or chosen by a person; see :class:`LabelVersion`."""
    return source != INFERENCE and not (tag == ORIGINAL and source in ("", "folder", "recovered"))


def to_record(version: LabelVersion) -> dict[str, Any]:
    """The data of a version for its side-car."""
    return version.describe()


def from_record(record: Mapping[str, Any], folder: Path) -> LabelVersion:
    """The version described by a side-car in ``folder``.

    Raises:
        ValueError, TypeError, KeyError: if the record is invalid.
    """
    if not isinstance(record, Mapping):
        raise TypeError("it is no JSON object")
    known = {f.name for f in fields(LabelVersion)}
    data = {key: value for key, value in record.items() if key in known}
    name = str(record["file"])
    if not name or Path(name).name != name:
        raise ValueError(f"file is {name!r}")
    data |= {"file": folder / name, "notes": tuple(record["notes"])}
    data |= {"missing_labels": tuple(record["missing_labels"]), "sequence": int(record["sequence"])}
    sent = str(record.get("sent_file", ""))
    if Path(sent).name != sent:
        raise ValueError(f"sent_file is {sent!r}")
    version = LabelVersion(**data)
    if not (isinstance(version.image_id, str) and isinstance(version.tag, str) and isinstance(version.sha256, str)):
        raise TypeError("image_id, tag and sha256 must be text")
    return version


def from_side_car(path: Path) -> LabelVersion:
    """The version described by a side-car file, with validated types.

    Raises:
        OSError, ValueError, TypeError, KeyError: if it cannot be read, or is invalid.
    """
    version = from_record(read_json(path), path.parent)
    _TYPES.validate_python(vars(version))
    return version


_TYPES = TypeAdapter(LabelVersion)


def suffix_of(path: Path) -> str:
    """``.nii.gz`` and the other mask extensions; for other files, the last suffix."""
    name = path.name.lower()
    return next((suffix for suffix in LABEL_SUFFIXES if name.endswith(suffix)), path.suffix)


def stem_for(sequence: int, tag: str, image_id: str) -> str:
    """The file stem of a version, from which a person, or a store without an index, can identify it."""
    tag_and_image = f".{tag}.{image_id}" if len(image_id.encode()) <= LONGEST_NAME_IN_FILE else ""
    return f"{sequence:08d}{tag_and_image}"


_STEM = re.compile(r"(?P<sequence>\d{8,})(?:\.(?P<tag>[^.]+)\.(?P<image>.+))?", re.DOTALL)


def parse_stem(stem: str) -> tuple[int, str, str] | None:
    """Sequence, tag and image id from a stem of :func:`stem_for`; tag and id are empty if it lacks them.

    >>> parse_stem("00000042.final.case_7")
    (42, 'final', 'case_7')
    """
    match = _STEM.fullmatch(stem)
    return (int(match["sequence"]), match["tag"] or "", match["image"] or "") if match else None
