"""QIDO-RS queries (PS3.18, 10.6) over an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from lib.dicom.attributes import OF_LEVEL, STUDY_ATTRIBUTES, SUMMARY, Json, Level, element, parse_path, tag_of
from lib.dicom.index import SeriesEntry, by_study, counts
from lib.dicom.matching import matches
from lib.dicom.resources import Resource, parse_number
from lib.errors import NotFoundError, ParameterError

NOT_ATTRIBUTES = frozenset({"limit", "offset", "fuzzymatching", "includefield", "accept"})
DEPTH = {"studies": 1, "series": 2, "instances": 3}
COUNTED = frozenset(
    map(
        tag_of,
        (
            *("ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"),
            "NumberOfSeriesRelatedInstances",
        ),
    )
)
"""Attributes that are computed for the response, since no instance has them."""


class Searchable(Protocol):
    """The part of an index that queries need."""

    def entries(self) -> list[SeriesEntry]:
        """The series of all studies."""

    def metadata(self, study: str = "", series: str = "", sop: str = "", summary: bool = False) -> list[Json]:
        """DICOM JSON of the instances of a study, a series, or one instance."""

    def first(self, study: str, series: str = "", sop: str = "") -> Json:
        """DICOM JSON of the first instance of a study, a series, or of one instance.

        Raises:
            NotFoundError: if there is none, which is possible while a study is being removed.
        """


def search(index: Searchable, resource: Resource, pairs: Sequence[tuple[str, str]], root: str) -> list[Json]:
    """Answer a query.

    Args:
        index: the index.
        resource: the level, and the study or series to which the query is limited.
        pairs: names and values of the query; a name may occur several times.
        root: address of the DICOMweb server, for Retrieve URL.

    Raises:
        ParameterError: for an unknown attribute, or an invalid number.
    """
    query = dict(pairs)
    limit = parse_number(query, "limit", 10**9, "a whole number from 0")
    offset = parse_number(query, "offset", 0, "a whole number from 0")
    fuzzy = query.get("fuzzymatching", "").lower() == "true"
    wanted = [(_known_path(name), value) for name, value in pairs if name.lower() not in NOT_ATTRIBUTES]
    fields = [tag for name, value in pairs if name.lower() == "includefield" for tag in value.split(",") if tag]
    in_full = any(path[0] not in SUMMARY | COUNTED for path, _ in wanted)
    matching = [
        entry
        for entry in _entries(index, resource)
        if _matches_all(_in_full(index, entry, resource) if in_full else entry, wanted, fuzzy)
    ]
    chosen = matching[offset : offset + limit]
    return [_shown(index, entry, resource, fields, root) for entry in chosen]


def _matches_all(entry: Json, wanted: Sequence[tuple[Sequence[str], str]], fuzzy: bool) -> bool:
    return all(matches(entry, path, value, fuzzy) for path, value in wanted)


def _in_full(index: Searchable, entry: Json, resource: Resource) -> Json:
    """All attributes of an entity's first instance, and the computed attributes of the entity.

    If the files of an entity have been deleted since it was listed, it is described by its summary.
    """
    keywords = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    uids = [_value(entry, keyword) if at < DEPTH[resource.level] else "" for at, keyword in enumerate(keywords)]
    try:
        return index.first(uids[0], uids[1], uids[2]) | entry
    except NotFoundError:
        return entry


def _known_path(name: str) -> tuple[str, ...]:
    path = parse_path(name)
    if path is None:
        raise ParameterError(
            name[:64], "", "keywords or tags of attributes, limit, offset, fuzzymatching, includefield"
        )
    return path


def _entries(index: Searchable, resource: Resource) -> Iterator[Json]:
    """The summaries of the level's entities, below the given study and series."""
    studies = by_study(entry for entry in index.entries() if _is_below(entry, resource))
    if resource.level == "studies":
        yield from (_newest_first(entries)[0].summary | counts(entries) for entries in studies.values())
    elif resource.level == "series":
        for entries in studies.values():
            of_study = counts(entries)
            for entry in entries:
                yield entry.summary | of_study | element("NumberOfSeriesRelatedInstances", entry.instances)
    else:
        yield from index.metadata(resource.study, resource.series, summary=True)


def _newest_first(entries: Sequence[SeriesEntry]) -> list[SeriesEntry]:
    """The entries with images first, since objects derived from images (SEG, SR) repeat the study's attributes."""
    return sorted(entries, key=lambda entry: entry.modality in ("SEG", "SR", "PR", "KO"))


def _is_below(entry: SeriesEntry, resource: Resource) -> bool:
    return resource.study in ("", entry.study) and resource.series in ("", entry.series)


def _shown(index: Searchable, entry: Json, resource: Resource, fields: Iterable[str], root: str) -> Json:
    """The response for one entity: standard attributes, requested attributes, and the Retrieve URL."""
    level: Level = resource.level  # type: ignore[assignment]  # parse_path lets only these through
    study, series, sop = (_value(entry, k) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
    tags = {*OF_LEVEL[level], *(tag_of(keyword) for keyword in COUNTS[level])}
    # below a study, its attributes are known; in a query over all studies they identify the series or instance
    tags |= set(STUDY_ATTRIBUTES) if not resource.study else set()
    asked = list(fields)
    if asked:
        entry = _in_full(index, entry, resource)
        # an attribute of a sequence is returned with the whole sequence
        tags |= set(entry) if "all" in asked else {path[0] for name in asked if (path := parse_path(name))}
    address = "/".join([root, "studies", study, *(["series", series] if level != "studies" else [])])
    address += f"/instances/{sop}" if level == "instances" else ""
    shown = {tag: entry[tag] for tag in sorted(tags & entry.keys())}
    return shown | element("RetrieveURL", address) | element("InstanceAvailability", "ONLINE")


COUNTS: dict[Level, tuple[str, ...]] = {
    "studies": ("ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"),
    "series": ("NumberOfSeriesRelatedInstances",),
    "instances": (),
}


def _value(entry: Json, keyword: str) -> str:
    return str(entry[tag_of(keyword)]["Value"][0])
