"""STOW-RS (PS3.18, 10.5): the parts of a request, and the answer."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataset import FileDataset

from lib.dicom.attributes import Json, element
from lib.dicom.files import describe, read_instance, reading
from lib.errors import ImageError, ParameterError

UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
CANNOT_UNDERSTAND = 0xC000
REFUSED = 0x0110
OTHER_STUDY = 0x0119
"""Failure reasons (PS3.18, table I.2-2)."""


@dataclass(frozen=True)
class Outcome:
    """What became of one instance.

    Attributes:
        sop_class: its SOP Class UID.
        sop: its SOP Instance UID.
        address: where it can be retrieved, if it was stored.
        failure: why it was not, as a code; 0 if it was.
        sentence: the same in words.
    """

    sop_class: str
    sop: str
    address: str = ""
    failure: int = 0
    sentence: str = ""


def split_parts(body: bytes, content_type: str) -> list[bytes]:
    """The files in a ``multipart/related`` body.

    Raises:
        ParameterError: when it is none, or is cut off.
    """
    boundary = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', content_type, re.IGNORECASE)
    if not content_type.lower().startswith("multipart/related") or boundary is None:
        raise ParameterError(
            "Content-Type", content_type[:200], 'multipart/related; type="application/dicom"; boundary=...'
        )
    marker = b"--" + (boundary[1] or boundary[2]).encode("latin-1")
    pieces = (b"\r\n" + body).split(b"\r\n" + marker)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise ParameterError("body", f"{len(body)} bytes", "parts between the boundary, closed by it")
    return [_content(piece) for piece in pieces[1:-1]]


def _content(piece: bytes) -> bytes:
    """A part without its headers, which end with an empty line; a part may have none."""
    if piece.startswith(b"\r\n\r\n"):
        return piece[4:]
    _, _, content = piece.partition(b"\r\n\r\n")
    return content


def read_part(content: bytes) -> FileDataset:
    """A part as an instance.

    Raises:
        ParameterError: when it is no DICOM, or has no UIDs.
    """
    try:
        with reading("it cannot be read"):
            instance = read_instance(io.BytesIO(content))
            for _ in instance.iterall():  # each value is decoded here, where its damage is told
                pass
            uids = [str(instance.get(keyword, "")) for keyword in UIDS]
    except ImageError as error:
        raise ParameterError("part", f"{len(content)} bytes", f"a DICOM file ({describe(error)})") from error
    bad = [uid for uid in uids if not re.fullmatch(r"[0-9.]{1,64}", uid)]
    if bad:
        raise ParameterError(
            "UIDs", bad[0][:70], "SOP Class, SOP Instance, Study and Series Instance UID in every instance"
        )
    return instance


def answer(outcomes: Sequence[Outcome]) -> tuple[int, Json]:
    """The status (200 all, 202 some, 409 none stored) and the DICOM JSON of a store request."""
    stored = [outcome for outcome in outcomes if not outcome.failure]
    failed = [outcome for outcome in outcomes if outcome.failure]
    told: Json = {}
    if stored:
        told |= element("ReferencedSOPSequence", *(_reference(o) | element("RetrieveURL", o.address) for o in stored))
    if failed:
        told |= element("FailedSOPSequence", *(_failure(o) for o in failed))
    return (200 if not failed else 202 if stored else 409), told


def _reference(outcome: Outcome) -> Json:
    return element("ReferencedSOPClassUID", outcome.sop_class) | element("ReferencedSOPInstanceUID", outcome.sop)


def _failure(outcome: Outcome) -> Json:
    # Error Comment has room for 64 characters; the whole sentence goes beside it, where any length is taken
    reason = element("FailureReason", outcome.failure) | element("ErrorComment", outcome.sentence[:64])
    return _reference(outcome) | reason | element("TextValue", outcome.sentence)
