"""Addresses of DICOMweb: what they name, and that nothing else gets through."""

from __future__ import annotations

import pytest

from lib.dicom.resources import MediaType, Resource, parse_accept, parse_path
from lib.errors import ParameterError


@pytest.mark.parametrize(
    ("path", "resource"),
    [
        ("studies", Resource("query", "studies")),
        ("studies/", Resource("query", "studies")),
        ("studies/1.2/series", Resource("query", "series", "1.2")),
        ("studies/1.2/instances", Resource("query", "instances", "1.2")),
        ("studies/1.2/series/3/instances", Resource("query", "instances", "1.2", "3")),
        ("studies/1.2", Resource("instances", "1.2", "1.2")),
        ("studies/1.2/metadata", Resource("metadata", "metadata", "1.2")),
        ("studies/1.2/series/3/rendered", Resource("rendered", "rendered", "1.2", "3")),
        ("studies/1/series/2/instances/3/frames/1,4", Resource("frames", "1,4", "1", "2", "3", (1, 4))),
        ("studies/1/series/2/instances/3/frames/2/rendered", Resource("rendered", "rendered", "1", "2", "3", (2,))),
    ],
)
def test_path_names_a_resource(path: str, resource: Resource) -> None:
    assert parse_path(path) == resource


@pytest.mark.parametrize(
    "path",
    [
        *("", "/studies", "//studies", "../system", "system", "patients", "instances/1", "studies/1.2/../../../system"),
        *("studies/..", "studies/../system", "studies/%2e%2e/system", "studies/1..2", "studies//series", "studies/a"),
        *(
            "studies/1?x=1",
            "studies/1#x",
            "studies/1\\..\\x",
            "studies/1/series/2/instances/3/file",
            "studies/1/delete",
        ),
        *("http://127.0.0.1/studies", "studies/1/series/2/instances/3/frames/x", "studies/1\0", "studies/" + "1" * 700),
        *("studies\n", "studies/1/metadata/../..", "STUDIES", "studies/1/series/2/instances/3/frames/1/../../x"),
    ],
)
def test_any_other_path_is_refused(path: str) -> None:
    with pytest.raises(ParameterError, match="a DICOMweb path that begins with"):
        parse_path(path)


def test_accept_is_sorted_by_weight_and_understands_quotes() -> None:
    header = 'image/png;q=0.5, multipart/related; type="image/jp2"; transfer-syntax=*, text/html;q=0'
    assert parse_accept(header) == [MediaType("image/jp2", True, "*"), MediaType("image/png", False)]
    assert parse_accept(None) == [MediaType("*/*", False)]
    assert parse_accept("multipart/related; type=application/octet-stream") == [
        MediaType("application/octet-stream", True)
    ]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("header", ["," * 60_000, '"",' * 20_000, '",' * 30_000, 'a;b="c,' * 8_000])
def test_accept_header_of_many_entries_is_read_once(header: str) -> None:
    """For each comma the whole rest was looked at, which took seconds of everybody's."""
    assert len(parse_accept(header)) <= 20_000


def test_commas_in_quotes_end_no_entry() -> None:
    assert [entry.name for entry in parse_accept('a/b;x="1,2", c/d , ,"e,f",g/h;x="i,j')] == [
        "a/b", "c/d", '"e,f"', "g/h",
    ]  # fmt: skip
