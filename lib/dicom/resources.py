"""Parses DICOMweb addresses (PS3.18) and the media types that a client accepts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lib.errors import ParameterError

View = Literal["query", "instances", "metadata", "frames", "rendered", "thumbnail"]

_UID = r"[0-9]{1,64}(?:\.[0-9]{1,64})*"
_PATTERNS: tuple[tuple[View, str], ...] = (
    ("query", r"(?:studies|series|instances)"),
    ("query", r"studies/(?P<study>UID)/(?:series|instances)"),
    ("query", r"studies/(?P<study>UID)/series/(?P<series>UID)/instances"),
    ("instances", r"studies/(?P<study>UID)"),
    ("instances", r"studies/(?P<study>UID)/series/(?P<series>UID)"),
    ("instances", r"studies/(?P<study>UID)/series/(?P<series>UID)/instances/(?P<sop>UID)"),
    ("metadata", r"studies/(?P<study>UID)(?:/series/(?P<series>UID)(?:/instances/(?P<sop>UID))?)?/metadata"),
    ("rendered", r"studies/(?P<study>UID)(?:/series/(?P<series>UID)(?:/instances/(?P<sop>UID))?)?/rendered"),
    ("thumbnail", r"studies/(?P<study>UID)(?:/series/(?P<series>UID)(?:/instances/(?P<sop>UID))?)?/thumbnail"),
    ("frames", r"studies/(?P<study>UID)/series/(?P<series>UID)/instances/(?P<sop>UID)/frames/(?P<frames>FRAMES)"),
    (
        "rendered",
        r"studies/(?P<study>UID)/series/(?P<series>UID)/instances/(?P<sop>UID)/frames/(?P<frames>FRAMES)/rendered",
    ),
)
_COMPILED = [
    (view, re.compile(p.replace("UID", _UID).replace("FRAMES", r"[0-9]{1,9}(?:,[0-9]{1,9})*"))) for view, p in _PATTERNS
]
LONGEST_PATH = 600
_ENTRY = re.compile(r"""(?:[^,"]|"[^"]*"?)+""")
"""One of the comma-separated entries, parts of which may be quoted; each character is examined once."""


@dataclass(frozen=True)
class Resource:
    """The resource that an address names.

    Attributes:
        view: the requested view of it.
        level: level of a query: ``studies``, ``series`` or ``instances``.
        study: Study Instance UID; "" for all. ``series`` and ``sop`` are analogous.
        frames: frame numbers from 1; empty for all.
    """

    view: View
    level: str
    study: str = ""
    series: str = ""
    sop: str = ""
    frames: tuple[int, ...] = ()


def parse_path(path: str) -> Resource:
    """Parse a path below the root of a DICOMweb server. Any other path is refused, however it is written.

    Raises:
        ParameterError: for a path that is not one of DICOMweb.

    >>> parse_path("studies/1.2/series").level
    'series'
    """
    trimmed = path[: LONGEST_PATH + 1].removesuffix("/")
    for view, pattern in _COMPILED:
        match = pattern.fullmatch(trimmed)
        if match and len(path) <= LONGEST_PATH:
            groups = match.groupdict()
            names = {name: groups.get(name) or "" for name in ("study", "series", "sop")}
            frames = tuple(int(number) for number in (groups.get("frames") or "").split(",") if number)
            return Resource(view, trimmed.split("/")[-1], **names, frames=frames)
    raise ParameterError("path", path[:200], "a DICOMweb path that begins with studies, series or instances")


@dataclass(frozen=True)
class MediaType:
    """One entry of an Accept header.

    Attributes:
        name: type of the parts of ``multipart/related``, or of the whole response.
        multipart: whether ``multipart/related`` is accepted.
        syntax: transfer syntax; ``*`` for any, "" for the default.
    """

    name: str
    multipart: bool
    syntax: str = ""


def parse_accept(header: str | None) -> list[MediaType]:
    """The entries of an Accept header sorted by weight; any type if there is no header.

    >>> parse_accept('multipart/related; type="image/jp2"; transfer-syntax=*')
    [MediaType(name='image/jp2', multipart=True, syntax='*')]
    """
    entries = []
    for text in _ENTRY.findall(header or "*/*"):
        name, *rest = [part.strip() for part in text.split(";")]
        options = {
            key.strip().lower(): value.strip().strip('"') for key, _, value in (part.partition("=") for part in rest)
        }
        weight = _weight(options.get("q", "1"))
        syntax = options.get("transfer-syntax", "")
        if name.lower() == "multipart/related":
            entries.append((weight, MediaType(options.get("type", "*/*").lower(), True, syntax)))
        elif name:
            entries.append((weight, MediaType(name.lower(), False, syntax)))
    return [entry for weight, entry in sorted(entries, key=lambda e: -e[0]) if weight > 0]


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def parse_number(query: Mapping[str, str], name: str, default: int, valid: str) -> int:
    """A whole number from 0 in a query.

    Raises:
        ParameterError: for other values.
    """
    text = query.get(name)
    if text is None or text == "":
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ParameterError(name, text[:50], valid)
    return int(text)
