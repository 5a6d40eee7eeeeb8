"""QIDO-RS (PS3.18, 10.6) over an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lib.dicom.attributes import OF_LEVEL, STUDY_ATTRIBUTES, Json, Level, element, matches, parse_tag, tag_of
from lib.dicom.index import DicomIndex, SeriesEntry, by_study, counts
from lib.dicom.resources import Resource, parse_number
from lib.errors import ParameterError

NOT_ATTRIBUTES = frozenset({"limit", "offset", "fuzzymatching", "includefield", "accept"})
MODALITIES = tag_of("ModalitiesInStudy")


def search(index: DicomIndex, resource: Resource, pairs: Sequence[tuple[str, str]], root: str) -> list[Json]:
    """Answer a query.

    Args:
        index: where to look.
        resource: which level, and below which study or series.
        pairs: the query's names and values; a name may come several times.
        root: address of the DICOMweb server, for Retrieve URL.

    Raises:
        ParameterError: for a name that is no attribute, or a number that is none.
    """
    query = dict(pairs)
    limit = parse_number(query, "limit", 10**9, "a whole number from 0")
    offset = parse_number(query, "offset", 0, "a whole number from 0")
    fuzzy = query.get("fuzzymatching", "").lower() == "true"
    wanted = [(_known_tag(name), value) for name, value in pairs if name.lower() not in NOT_ATTRIBUTES]
    fields = [tag for name, value in pairs if name.lower() == "includefield" for tag in value.split(",") if tag]
    found = [
        entry for entry in _entries(index, resource) if all(matches(entry, tag, value, fuzzy) for tag, value in wanted)
    ]
    chosen = found[offset : offset + limit]
    return [_shown(index, entry, resource, fields, root) for entry in chosen]


def _known_tag(name: str) -> str:
    tag = parse_tag(name)
    if tag is None:
        raise ParameterError(
            name[:64], "", "keywords or tags of attributes, limit, offset, fuzzymatching, includefield"
        )
    return tag


def _entries(index: DicomIndex, resource: Resource) -> Iterator[Json]:
    """Everything that is known of the level's entities, below the named study and series."""
    listed = {uid: entry for uid, entry in index.series().items() if _is_below(entry, resource)}
    studies = by_study(listed)
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
    """What was made of images (SEG, SR) repeats the study's attributes; images are asked first."""
    return sorted(entries, key=lambda entry: entry.modality in ("SEG", "SR", "PR", "KO"))


def _is_below(entry: SeriesEntry, resource: Resource) -> bool:
    return resource.study in ("", entry.study) and resource.series in ("", entry.series)


def _shown(index: DicomIndex, entry: Json, resource: Resource, fields: Iterable[str], root: str) -> Json:
    """What is answered of one entity: what is always told, what was asked for, and where it can be retrieved."""
    level: Level = resource.level  # type: ignore[assignment]  # parse_path lets only these through
    study, series, sop = (
        _value(entry, keyword) for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    )
    tags = {*OF_LEVEL[level], *(tag_of(keyword) for keyword in COUNTS[level])}
    # below a study its attributes are known; in a query over all they tell whose series or instance it is
    tags |= set(STUDY_ATTRIBUTES) if not resource.study else set()
    asked = list(fields)
    if asked:
        narrow = {"studies": (study, "", ""), "series": (study, series, ""), "instances": (study, series, sop)}[level]
        entry = index.metadata(*narrow)[0] | entry
        tags |= set(entry) if "all" in asked else {tag for name in asked if (tag := parse_tag(name))}
    address = "/".join([root, "studies", study, *(["series", series] if level != "studies" else [])])
    address += f"/instances/{sop}" if level == "instances" else ""
    told = {tag: entry[tag] for tag in sorted(tags & entry.keys())}
    return told | element("RetrieveURL", address) | element("InstanceAvailability", "ONLINE")


COUNTS: dict[Level, tuple[str, ...]] = {
    "studies": ("ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"),
    "series": ("NumberOfSeriesRelatedInstances",),
    "instances": (),
}


def _value(entry: Json, keyword: str) -> str:
    return str(entry[tag_of(keyword)]["Value"][0])
