"""STOW-RS (PS3.18, 10.5): the parts of a request, and the response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import FileDataset
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from lib.dicom.attributes import Json, element
from lib.dicom.files import check_levels, describe, is_dicom, is_uid, read_instance, reading
from lib.errors import ImageError, ParameterError

UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
CANNOT_UNDERSTAND = 0xC000
REFUSED = 0x0110
OTHER_STUDY = 0x0119
"""Failure reasons (PS3.18, table I.2-2)."""
MOST_PARTS = 20_000
LONGEST_BOUNDARY = 70  # RFC 2046, 5.1.1
LONGEST_PREAMBLE = 64 * 1024


@dataclass(frozen=True)
class Outcome:
    """The result for one instance.

    Attributes:
        sop_class: its SOP Class UID.
        sop: its SOP Instance UID.
        address: URL from which it can be retrieved, if it was stored.
        failure: code of the failure; 0 if it was stored.
        sentence: the failure in words.
    """

    sop_class: str
    sop: str
    address: str = ""
    failure: int = 0
    sentence: str = ""


class PartWriter:
    """Writes the parts of a ``multipart/related`` body to files while the body arrives.

    Args:
        content_type: content type of the request.
        folder: folder for the files.

    Raises:
        ParameterError: if the content type is another one, or has no boundary.
    """

    def __init__(self, content_type: str, folder: Path) -> None:
        match = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', content_type, re.IGNORECASE)
        is_related = content_type.lower().startswith("multipart/related")
        if not is_related or match is None or len(match[1] or match[2]) > LONGEST_BOUNDARY:
            raise ParameterError(
                "Content-Type", content_type[:200], 'multipart/related; type="application/dicom"; boundary=...'
            )
        boundary = (match[1] or match[2]).encode("latin-1")
        self._marker = b"\r\n--" + boundary
        self._preamble: bytes | None = b"\r\n"
        self._folder, self._files, self._part = folder, list[Path](), ExitStack()
        self._file: BinaryIO | None = None
        self._size, self._closed = 0, False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_part_data": self._keep,
                "on_part_end": self._part.close,
                "on_end": self._end,
            },
        )

    def write(self, block: bytes) -> None:
        """Process the next bytes of the body.

        Raises:
            ParameterError: if they are not valid parts, or if there are too many.
        """
        self._size += len(block)
        try:
            self._parser.write(block if self._preamble is None else self._without_preamble(block))
        except MultipartParseError as error:
            raise self._error() from error

    def finish(self) -> list[Path]:
        """The files of all parts, in their order.

        Raises:
            ParameterError: if the body was cut off, or had no part.
        """
        self._part.close()
        if not self._closed or not self._files:
            raise self._error()
        return self._files

    def abandon(self) -> None:
        """Close the unfinished file."""
        self._part.close()

    def _without_preamble(self, block: bytes) -> bytes:
        """The body after its preamble: the text before the first boundary, which has to be ignored (RFC 2046)."""
        start = (self._preamble or b"") + block
        at = start.find(self._marker)
        if at >= 0:
            self._preamble = None
            return start[at + 2 :]
        if len(start) > LONGEST_PREAMBLE:
            raise self._error()
        self._preamble = start
        return b""

    def _begin(self) -> None:
        if len(self._files) == MOST_PARTS:
            raise ParameterError("body", f"more than {MOST_PARTS} parts", f"at most {MOST_PARTS} in one request")
        path = self._folder / f"{len(self._files):05d}.dcm"
        self._file = self._part.enter_context(path.open("wb"))
        self._files.append(path)

    def _keep(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._closed = True

    def _error(self) -> ParameterError:
        return ParameterError("body", f"{self._size} bytes", "parts between the boundary, closed by it")


def read_part(file: Path) -> FileDataset:
    """Read a part as an instance; a file that does not begin as DICOM does is refused at once.

    Raises:
        ParameterError: if it is not DICOM, or has no UIDs.
    """
    try:
        if not is_dicom(file):
            raise ImageError("it does not begin as DICOM does")
        with reading("it cannot be read"):
            instance = read_instance(file)
            check_levels(instance)  # all values are decoded here, where damage can be reported
            uids = [str(instance.get(keyword, "")) for keyword in UIDS]
    except ImageError as error:
        raise ParameterError("part", f"{file.stat().st_size} bytes", f"a DICOM file ({describe(error)})") from error
    bad = [uid for uid in uids if not is_uid(uid)]
    if bad:
        raise ParameterError(
            "UIDs", bad[0][:70], "SOP Class, SOP Instance, Study and Series Instance UID in every instance"
        )
    return instance


def answer(outcomes: Sequence[Outcome]) -> tuple[int, Json]:
    """The status (200 all, 202 some, 409 none stored) and the DICOM JSON of the response to a store request."""
    stored = [outcome for outcome in outcomes if not outcome.failure]
    failed = [outcome for outcome in outcomes if outcome.failure]
    data_set: Json = {}
    if stored:
        data_set |= element(
            "ReferencedSOPSequence", *(_reference(o) | element("RetrieveURL", o.address) for o in stored)
        )
    if failed:
        data_set |= element("FailedSOPSequence", *(_failure(o) for o in failed))
    return (200 if not failed else 202 if stored else 409), data_set


def _reference(outcome: Outcome) -> Json:
    return element("ReferencedSOPClassUID", outcome.sop_class) | element("ReferencedSOPInstanceUID", outcome.sop)


def _failure(outcome: Outcome) -> Json:
    # Error Comment is limited to 64 characters; the whole sentence goes into another attribute without this limit
    reason = element("FailureReason", outcome.failure) | element("ErrorComment", outcome.sentence[:64])
    return _reference(outcome) | reason | element("TextValue", outcome.sentence)
