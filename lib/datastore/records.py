"""What is kept of a submitted label besides its voxels."""

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
"""How a label came that a model made."""
LONGEST_NAME_IN_FILE = 150
VERSIONS_A_FOLDER = 1000
LABEL_SUFFIXES = (".nii.gz", ".nii", ".nrrd")


@dataclass(frozen=True)
class Submission:
    """A label that is about to be kept.

    Attributes:
        image_id: the image that it belongs to.
        tag: ``final``, ``original`` or a tag of the client's own.
        user: who sent it, as the server knows him or her.
        client_id: what the client calls itself.
        preset: the task that its names belong to.
        model_version: of the prediction that it started from; empty where that is not known.
        engine: what computed that prediction; empty where that is not known.
        label_map: name to value in the file.
        missing_labels: the preset's labels that it does not speak of.
        voxels_changed: how many voxels differ from that prediction; None where that is not known.
        prompts_used: how many prompts an interactive model was sent for it; None where that is not known.
        seconds_spent: from the hand-out of the case to its submission; None where it was not handed out.
        restored_from: the version that it is a copy of.
        source: the way by which it came, such as ``rest``, ``dicom`` or ``inference``.
        notes: what was done to it on its way in, in sentences.
        info: what the client sent along.
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
    """What a model made of an image on another machine.

    Attributes:
        image_id: the image.
        mask: a ``.nii.gz``.
        params: what the answer of an inference would say of it.
        problem: why there is none.
    """

    image_id: str
    mask: bytes = b""
    params: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class LabelVersion(Submission):
    """A label that has been kept, and is never changed again.

    Attributes:
        sequence: grows by one with each version of the whole store.
        version_id: its name, unique in the store.
        file: the mask.
        size: of the file in bytes.
        sha256: of the file, in hexadecimal.
        saved_at: when, in ISO 8601 and UTC.
        sent_file: name of the file as it came, in ``history/sent``; empty where it was kept as it came.
        sent_sha256: of that file.
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
        """The kind of the mask's file."""
        return suffix_of(self.file)

    @property
    def is_drawn(self) -> bool:
        """Whether a person drew it, or chose it; stock MONAI Label keeps predictions in ``labels/original``."""
        return is_drawn(self.source, self.tag)

    def describe(self) -> dict[str, Any]:
        """Plain data for a client, without the server's folders."""
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
    """Plain data of a version, for its side-car."""
    return version.describe()


def from_record(record: Mapping[str, Any], folder: Path) -> LabelVersion:
    """The version of a side-car in ``folder``.

    Raises:
        ValueError, TypeError, KeyError: when it is not one.
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
    """The version of a side-car file, each field of which has its type.

    Raises:
        OSError, ValueError, TypeError, KeyError: when it cannot be read, or is none.
    """
    version = from_record(read_json(path), path.parent)
    _TYPES.validate_python(vars(version))
    return version


_TYPES = TypeAdapter(LabelVersion)


def suffix_of(path: Path) -> str:
    """``.nii.gz`` and the other kinds of a mask's file; the last suffix of any other."""
    name = path.name.lower()
    return next((suffix for suffix in LABEL_SUFFIXES if name.endswith(suffix)), path.suffix)


def stem_for(sequence: int, tag: str, image_id: str) -> str:
    """The name of a version's files: a person who finds them, or a store that lost all else, can tell what they are."""
    tag_and_image = f".{tag}.{image_id}" if len(image_id.encode()) <= LONGEST_NAME_IN_FILE else ""
    return f"{sequence:08d}{tag_and_image}"


_STEM = re.compile(r"(?P<sequence>\d{8,})(?:\.(?P<tag>[^.]+)\.(?P<image>.+))?", re.DOTALL)


def parse_stem(stem: str) -> tuple[int, str, str] | None:
    """Sequence, tag and image id from a name made by :func:`stem_for`; empty texts where it does not tell.

    >>> parse_stem("00000042.final.case_7")
    (42, 'final', 'case_7')
    """
    match = _STEM.fullmatch(stem)
    return (int(match["sequence"]), match["tag"] or "", match["image"] or "") if match else None
