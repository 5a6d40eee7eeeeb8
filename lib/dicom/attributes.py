"""Attributes of studies, series and instances in the DICOM JSON model (PS3.18, annex F)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Level = Literal["studies", "series", "instances"]
LARGEST_BINARY_BYTES = 1024
"""Longer binary values, which are mostly private, are omitted from the metadata; pixels are always omitted."""


def tag_of(keyword: str) -> str:
    """The tag of a keyword, as eight hexadecimal digits.

    >>> tag_of("PatientID")
    '00100020'
    """
    return f"{tag_for_keyword(keyword):08X}"


CHARACTER_SET = tag_of("SpecificCharacterSet")
STUDY_ATTRIBUTES = tuple(
    map(
        tag_of,
        (
            *("SpecificCharacterSet", "StudyDate", "StudyTime", "AccessionNumber", "TimezoneOffsetFromUTC"),
            *(
                "ReferringPhysicianName",
                "PatientName",
                "PatientID",
                "PatientBirthDate",
                "PatientSex",
                "IssuerOfPatientID",
            ),
            *("StudyInstanceUID", "StudyID", "StudyDescription"),
        ),
    )
)
SERIES_ATTRIBUTES = tuple(
    map(
        tag_of,
        (
            *("Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber", "SeriesDate", "SeriesTime"),
            *("BodyPartExamined", "ProtocolName", "Manufacturer", "FrameOfReferenceUID"),
            *("PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime", "RequestAttributesSequence"),
        ),
    )
)
INSTANCE_ATTRIBUTES = tuple(
    map(
        tag_of,
        (
            *("SOPClassUID", "SOPInstanceUID", "InstanceNumber", "Rows", "Columns", "BitsAllocated"),
            *("NumberOfFrames", "ContentDate", "ContentTime"),
        ),
    )
)
SEQUENCE_KEYWORDS = (
    *("ImageType", "SequenceName", "ScanningSequence", "SequenceVariant", "ContrastBolusAgent"),
    *("EchoTime", "RepetitionTime", "InversionTime"),
)
"""Attributes that distinguish the sequences of a study."""
SUMMARY = frozenset((*STUDY_ATTRIBUTES, *SERIES_ATTRIBUTES, *INSTANCE_ATTRIBUTES, *map(tag_of, SEQUENCE_KEYWORDS)))
TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
"""Attributes that every image must have, possibly empty (PS3.3, C.7.1.1 and C.7.2.1); anonymisers remove some."""
OF_LEVEL: dict[Level, tuple[str, ...]] = {
    "studies": STUDY_ATTRIBUTES,
    "series": (tag_of("StudyInstanceUID"), *SERIES_ATTRIBUTES),
    "instances": (tag_of("StudyInstanceUID"), tag_of("SeriesInstanceUID"), tag_of("Modality"), *INSTANCE_ATTRIBUTES),
}


UNFIT = (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)
"""Exceptions that pydicom has raised for values that DICOM JSON cannot represent."""


def to_json(instance: Dataset) -> Json:
    """All attributes of an instance except pixels, long binary values and values that JSON cannot represent.

    ``Dataset.to_json_dict(suppress_invalid_tags=True)`` would temporarily change the strictness with which all threads
    read, and permanently if two threads call it at once, since pydicom has one setting for the process.
    """
    data: Json = {}
    for element in instance:
        if _is_long_binary(element):
            continue
        try:
            data[f"{element.tag:08X}"] = element.to_json_dict(None, LARGEST_BINARY_BYTES)
        except UNFIT as error:
            logger.info("attribute %s is left out of the JSON: %s", element.tag, type(error).__name__)
    return _as_unicode(data)


def _as_unicode(data: Json) -> Json:
    """Declare texts as UTF-8, which JSON uses whatever the encoding of the file (PS3.18, F.2)."""
    if CHARACTER_SET in data:
        data[CHARACTER_SET] = {"vr": "CS", "Value": ["ISO_IR 192"]}
    for item in data.values():
        if item.get("vr") == "SQ":
            for below in item.get("Value") or []:
                _as_unicode(below)
    return data


def _is_long_binary(element: DataElement) -> bool:
    if element.VR in ("OB", "OW", "OD", "OF", "OL", "OV", "UN", "OB or OW"):
        return element.tag.group == 0x7FE0 or len(element.value or b"") > LARGEST_BINARY_BYTES
    return False


def summarize(metadata: Json) -> Json:
    """The attributes of an instance that queries and lists use most often."""
    return {tag: metadata[tag] for tag in SUMMARY & metadata.keys()}


def first_value(metadata: Mapping[str, Any], keyword: str) -> str:
    """The first value of an attribute as text; "" if there is none."""
    values = metadata.get(tag_of(keyword), {}).get("Value") or [""]
    return _as_text(values[0])


def all_values(metadata: Mapping[str, Any], keyword: str) -> tuple[str, ...]:
    """The values of an attribute as texts."""
    return tuple(_as_text(value) for value in metadata.get(tag_of(keyword), {}).get("Value") or [])


def element(keyword: str, *values: Any) -> Json:
    """One element as a dictionary that can be merged into DICOM JSON."""
    tag = tag_of(keyword)
    return {tag: {"vr": dictionary_VR(int(tag, 16)), "Value": list(values)}}


def parse_path(text: str) -> tuple[str, ...] | None:
    """Parse an attribute of a query into tags of eight digits; tags of enclosing sequences come first, before dots.

    Returns:
        None if one of them is neither a keyword nor a tag.

    >>> parse_path("RequestAttributesSequence.ScheduledProcedureStepID")
    ('00400275', '00400009')
    """
    tags = [_parse_tag(part) for part in text.split(".")]
    return None if None in tags else tuple(tag for tag in tags if tag)


def _parse_tag(text: str) -> str | None:
    if re.fullmatch(r"[0-9A-Fa-f]{8}", text):
        return text.upper()
    number = tag_for_keyword(text)
    return None if number is None else f"{number:08X}"


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping):  # a person's name
        return str(value.get("Alphabetic", ""))
    return str(value)


def dump(data: Sequence[Json] | Json) -> bytes:
    """JSON as bytes; numbers that are not finite become null, since JSON has no NaN."""
    try:
        return json.dumps(data, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_without_nan(data)).encode()


def _without_nan(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))) else data
