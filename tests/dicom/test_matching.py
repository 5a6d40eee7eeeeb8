"""Queries: what matches which value, by VR."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from lib.dicom.attributes import parse_path
from lib.dicom.index import DicomIndex
from lib.dicom.matching import has_pattern, matches
from lib.dicom.query import search
from lib.dicom.resources import Resource

Make = Callable[..., list[Path]]
NAME = "00100010"
YAMADA = {"Alphabetic": "O'Brien-Yamada^Tarou", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"}


def entry(vr: str, *values: Any) -> dict[str, Any]:
    return {NAME: {"vr": vr, "Value": list(values)}}


@pytest.mark.parametrize("fuzzy", [False, True])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ({"Alphabetic": "Mueller, A 12"}, "Mueller, A 12"),
        ({"Alphabetic": "A[1]B"}, "A[1]B"),
        ({"Alphabetic": "A[1]B"}, "a[1]*"),
        (YAMADA, "*Brien*"),
        (YAMADA, "*Yamada*"),
        (YAMADA, "*yamada*"),
        (YAMADA, "O'BRIEN-YAMADA^TAROU"),
        (YAMADA, "山田^太郎"),
        (YAMADA, "*山田*"),
        (YAMADA, "やまだ*"),
        (YAMADA, "*Yamada*=山田*"),
        (YAMADA, "=山田^太郎"),
        ({"Alphabetic": "Doe^John^^"}, "Doe^John"),
        ({"Alphabetic": "Doe^John"}, "Doe^John^^^"),
        ({"Alphabetic": "M\u00fcller"}, "mu\u0308ller"),
    ],
)
def test_name_matches_in_every_group_whatever_the_case(name: dict[str, str], wanted: str, fuzzy: bool) -> None:
    assert matches(entry("PN", name), [NAME], wanted, fuzzy)


@pytest.mark.parametrize("wanted", ["Yamada", "*Suzuki*", "山田", "O'Brien", "*Yamada*=鈴木*", "O?Brie"])
def test_name_that_is_another_does_not_match(wanted: str) -> None:
    assert not matches(entry("PN", YAMADA), [NAME], wanted)


@pytest.mark.parametrize("wanted", ["yamada tarou", "obrien", "O'Br", "brien*", "Tarou,Yamada", "山田", "*Yam^Tar*"])
def test_fuzzy_takes_the_words_of_a_name_in_any_order(wanted: str) -> None:
    assert matches(entry("PN", YAMADA), [NAME], wanted, fuzzy=True)


def test_fuzzy_takes_names_without_their_accents_and_no_other_words() -> None:
    assert matches(entry("PN", {"Alphabetic": "Müller^José"}), [NAME], "muller jose", fuzzy=True)
    assert not matches(entry("PN", {"Alphabetic": "Müller^José"}), [NAME], "muller anna", fuzzy=True)


@pytest.mark.parametrize(
    ("vr", "value", "wanted", "expected"),
    [
        ("LO", "Liver, late [2]", "Liver, late [2]", True),
        ("LO", "Liver, late [2]", "*LATE*", True),
        ("LO", "Liver, late", "late", False),
        ("LO", "brain", "abdomen\\brain", True),
        ("LO", "a.c", "abc", False),
        ("CS", "MR", "CT,MR", True),
        ("CS", "MR", "CT\\MR", True),
        ("CS", "MR", "C?", False),
        ("UI", "1.2.3", "1.2,1.2.3", True),
        ("UI", "1.2.3", "1.2.*", False),
        ("DS", 8.0, "8", True),
        ("IS", 3, "03", True),
        ("IS", 3, "three", False),
        ("DA", "20000101", "19991231-20000101", True),
        ("DA", "20000101", "20000102-", False),
        ("DA", "20000101", "20000101", True),
        ("TM", "101500.5", "1010-1015", True),
    ],
)
def test_value_matches_by_its_vr(vr: str, value: Any, wanted: str, expected: bool) -> None:
    assert matches(entry(vr, value), [NAME], wanted) is expected


def test_attribute_in_a_sequence_is_matched_by_its_path() -> None:
    inner = {"00400009": {"vr": "SH", "Value": ["STEP-7"]}}
    path = parse_path("RequestAttributesSequence.ScheduledProcedureStepID")
    assert path is not None
    assert matches({"00400275": {"vr": "SQ", "Value": [inner]}}, path, "STEP-7")
    assert not matches({"00400275": {"vr": "SQ", "Value": [inner]}}, path, "STEP-8")
    assert parse_path("RequestAttributesSequence.Nonsense") is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", ["*a" * 40 + "b", "*?" * 40 + "b", "*" * 5000 + "b", "a*" * 40 + "b", "*aa?" * 30])
def test_pattern_of_many_wildcards_ends(pattern: str) -> None:
    """As one expression it would be tried in more ways than can be counted, while every other client waits."""
    assert not has_pattern("a" * 64, pattern)


def test_wildcards_are_those_of_an_expression() -> None:
    draw = random.Random(1)
    for _ in range(5000):
        text = "".join(draw.choices("ab", k=draw.randrange(8)))
        pattern = "".join(draw.choices("ab*?", k=draw.randrange(8)))
        expression = "".join({"*": ".*", "?": "."}.get(letter, letter) for letter in pattern)
        assert has_pattern(text, pattern) is (re.fullmatch(expression, text) is not None), (text, pattern)


def test_query_finds_by_name_and_tells_texts_as_utf8(tmp_path: Path, make_series: Make) -> None:
    for file in make_series("axial", "MR", "one"):
        instance = dcmread(file)
        instance.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        instance.PatientName = "O'Brien-Yamada^Tarou=山田^太郎=やまだ^たろう"
        instance.PatientID = "Mueller, A 12"
        instance.save_as(file)
    index = DicomIndex(tmp_path, tmp_path / ".dicom" / "index.sqlite")
    index.scan()

    def found(**query: str) -> list[dict[str, Any]]:
        return search(index, Resource("query", "studies"), list(query.items()), "http://host/dicom-web")

    for wanted in ("*Yamada*", "*brien*", "*山田*", "*たろう"):
        assert len(found(PatientName=wanted, fuzzymatching="true")) == len(found(PatientName=wanted)) == 1
    (study,) = found(PatientID="Mueller, A 12")
    assert study["00100010"]["Value"] == [YAMADA]
    assert study["00080005"]["Value"] == ["ISO_IR 192"]
    assert index.metadata()[0]["00080005"]["Value"] == ["ISO_IR 192"]
    assert len(found(FlipAngle="8")) == 1, "an attribute that is not in the summary"
    assert found(FlipAngle="9") == []
