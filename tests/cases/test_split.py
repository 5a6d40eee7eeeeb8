"""Who is held out: fixed for each subject, whoever else arrives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.cases.split import (
    Split,
    extend_split,
    read_split,
    subject_from_consecutive_pair,
    subject_from_stem,
    subject_until,
    write_split,
)
from lib.errors import TrainingError

NOBODY = Split((), ())


def _ids(count: int) -> list[str]:
    return [f"case_{number:03d}" for number in range(1, count + 1)]


def test_split_grows_without_moving_anybody() -> None:
    split = NOBODY
    for count in range(1, 120):
        grown = extend_split(split, _ids(count), 0.2)
        assert set(split.train) <= set(grown.train)
        assert set(split.validation) <= set(grown.validation)
        assert sorted(grown.train + grown.validation) == _ids(count)
        split = grown
    assert 0.1 < len(split.validation) / 119 < 0.3


def test_split_does_not_depend_on_the_order_of_arrival() -> None:
    at_once = extend_split(NOBODY, _ids(60), 0.25)
    again = extend_split(NOBODY, reversed(_ids(60)), 0.25)
    assert at_once == again


def test_split_keeps_cases_whose_label_was_deleted() -> None:
    split = extend_split(NOBODY, _ids(40), 0.2)
    assert extend_split(split, _ids(10), 0.2) == split


def test_split_tests_on_some_subjects_once_there_are_enough() -> None:
    split = NOBODY
    for count in range(1, 200):
        grown = extend_split(split, _ids(count), 0.2, test_share=0.1)
        for side in ("train", "validation", "test"):
            assert set(getattr(split, side)) <= set(getattr(grown, side)), "nobody moves"
        assert bool(grown.test) <= (count >= 50)
        split = grown
    assert 0.05 < len(split.test) / 150 < 0.15
    assert 0.1 < len(split.validation) / 199 < 0.3
    assert len(split.train) + len(split.validation) + len(split.test) == 199


def test_split_knows_a_subject_again_by_its_digest_alone() -> None:
    """A patient's first image is gone, with the only place that named the patient."""
    patients = {f"scan{number}": f"patient{number // 2}" for number in range(40)}
    split = extend_split(NOBODY, [f"scan{n}" for n in range(0, 40, 2)], 0.3, patients.__getitem__)
    left = {name: patient for name, patient in patients.items() if int(name[4:]) % 2}
    grown = extend_split(split, left, 0.3, lambda case: left.get(case, case))
    side = {case: name for name in ("train", "validation") for case in getattr(grown, name)}
    assert all(side[f"scan{number}"] == side[f"scan{number + 1}"] for number in range(0, 40, 2))
    assert "patient" not in json.dumps(dict(grown.subjects))


def test_subject_is_what_stands_before_the_separator() -> None:
    assert [subject_until("_")(name) for name in ("p017_t1", "p017_t2_b", "p018")] == ["p017", "p017", "p018"]
    assert subject_until("")("p017_t1") == "p017_t1"


def test_split_of_fewer_than_five_trains_on_all() -> None:
    split = extend_split(NOBODY, _ids(4), 0.5)
    assert (split.train, split.validation) == (tuple(_ids(4)), ())


def test_split_of_five_holds_one_out_at_least() -> None:
    split = extend_split(NOBODY, _ids(5), 1e-9)
    assert len(split.validation) == 1
    grown_by_one = extend_split(extend_split(NOBODY, _ids(4), 0.2), _ids(5), 1e-9)
    assert grown_by_one.validation == ("case_005",), "those that were trained on stay"


@pytest.mark.parametrize("count", [5, 8, 10])
def test_split_counts_the_studies_cases_and_not_those_of_the_shipped_weights(count: int) -> None:
    """With the shipped cases counted, nobody was held out for 34 % of servers with five labels."""
    shipped = Split(tuple(f"theirs_{n}" for n in range(163)), tuple(f"held_{n}" for n in range(45)))
    for server in range(200):
        ids = [f"server{server}_{number}" for number in range(count)]
        split = extend_split(NOBODY, ids, 0.2, test_share=0.1, shipped=shipped)
        assert 1 <= len(split.validation) <= count // 2
        assert sorted(split.train + split.validation) == sorted(ids), "and nobody is only tested on before fifty"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fewer_than_five_are_all_trained_on_whoever_they_are(count: int) -> None:
    ids = _ids(count)
    assert extend_split(NOBODY, ids, 0.99, shipped=Split((), tuple(ids))).train == tuple(ids)
    assert extend_split(NOBODY, ids, 0.99, shipped=Split(tuple(_ids(163)), ())).train == tuple(ids)


def test_cases_of_the_shipped_weights_are_never_judged_on_and_their_judges_first() -> None:
    shipped = Split(tuple(_ids(20)), ("held_1", "held_2"))
    only_theirs = extend_split(NOBODY, _ids(20), 0.9, shipped=shipped)
    assert (only_theirs.train, only_theirs.validation) == (tuple(_ids(20)), ())
    twins = extend_split(NOBODY, ["p1_b", "p2", "p3", "p4", "p5"], 0.99, subject_until("_"), shipped=Split(("p1",), ()))
    assert "p1_b" in twins.train, "the subject is known to the weights"
    mixed = extend_split(NOBODY, [*_ids(6), "held_1", "held_2", "new"], 1e-9, shipped=shipped)
    assert mixed.validation == ("held_1", "held_2")


def test_labelled_cases_are_never_all_held_out() -> None:
    """Labels were deleted until only held-out ones are left, or all are of a held-out subject."""
    left = extend_split(Split(("a",), ("b", "c")), ["b", "c"], 0.2)
    assert (left.train, left.validation) == (("a", "b", "c"), ())
    many = extend_split(Split(("a",), tuple(_ids(6))), _ids(6), 0.2)
    assert len(many.validation) == 1 and len(many.train) == 6
    twins = extend_split(Split((), ("p1_a",)), [f"p1_{letter}" for letter in "abcde"], 0.2, subject_until("_"))
    assert (len(twins.train), twins.validation) == (5, ())
    judges = extend_split(NOBODY, _ids(5), 0.2, shipped=Split((), tuple(_ids(5))))
    assert (len(judges.train), len(judges.validation)) == (3, 2)


def test_split_with_share_0_holds_nobody_out() -> None:
    split = extend_split(NOBODY, _ids(50), 0)
    assert (split.train, split.validation, split.test) == (tuple(_ids(50)), (), ())


def test_split_with_a_share_near_1_still_trains_on_somebody() -> None:
    split = extend_split(NOBODY, _ids(10), 0.999999)
    assert len(split.train) >= 1
    assert len(split.validation) >= 8


@pytest.mark.parametrize("count", [10, 52, 200])
def test_split_keeps_a_subject_on_one_side(count: int) -> None:
    split = extend_split(NOBODY, _ids(count), 0.2, subject_from_consecutive_pair)
    sides = {subject_from_consecutive_pair(case): "train" for case in split.train}
    assert not [case for case in split.validation if subject_from_consecutive_pair(case) in sides]
    assert split.validation


def test_split_sends_a_twin_where_its_twin_is() -> None:
    known = Split(("case_001", "case_003", "case_005", "case_007"), ("case_009",))
    grown = extend_split(known, [*_ids(10)], 0.5, subject_from_consecutive_pair)
    assert grown.validation == ("case_009", "case_010")


def test_split_made_by_another_rule_moves_nobody() -> None:
    """The first rule took twins for strangers; what was trained on is never validated on afterwards."""
    known = Split(("case_001", "case_003", "case_005", "case_007"), ("case_002",))
    grown = extend_split(known, _ids(8), 0.2, subject_from_consecutive_pair)
    assert set(known.train) <= set(grown.train)
    assert "case_002" in grown.validation


def test_subject_of_consecutive_pairs() -> None:
    assert [subject_from_consecutive_pair(f"hippocampus_{i:03d}") for i in (1, 2, 3, 4, 367, 368)] == [
        "hippocampus_1",
        "hippocampus_1",
        "hippocampus_2",
        "hippocampus_2",
        "hippocampus_184",
        "hippocampus_184",
    ]
    assert subject_from_stem("a_1") == "a_1"


def test_subject_of_an_id_without_a_number_is_refused() -> None:
    with pytest.raises(TrainingError, match="'scan' does not end in a number"):
        subject_from_consecutive_pair("scan")


def test_split_with_a_case_on_both_sides_cannot_exist() -> None:
    with pytest.raises(TrainingError, match=r"\['a'\] are in both"):
        Split(("a", "b"), ("a",))


def test_split_file_round_trip_says_how_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "split.json"
    split = Split(("a", "b"), ("c",), ("d",), {"a": "0" * 16})
    write_split(path, split, "by hand")
    assert read_split(path) == split
    assert json.loads(path.read_text(encoding="utf-8"))["how"] == "by hand"
    assert [p.name for p in path.parent.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "null",
        '{"train": ["a"]}',
        '{"train": 1, "validation": []}',
        '{"train": "abc", "validation": []}',
        '{"train": [["a"]], "validation": []}',
        '{"train": [1], "validation": ["a"]}',
        '{"train": ["a"], "validation": [], "test": {"b": 1}}',
        '{"train": ["a"], "validation": [], "subjects": {"a": "nobody"}}',
        '{"train": ["a"], "validation": [], "subjects": {"a": 5}}',
        '{"train": ["a"], "validation": [], "subjects": ["a"]}',
    ],
)
def test_split_file_that_is_none_is_refused_in_words(tmp_path: Path, content: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TrainingError, match=r"split\.json' cannot be used"):
        read_split(path)


def test_split_file_that_is_missing_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No such file"):
        read_split(tmp_path / "none.json")


def test_shipped_split_keeps_subjects_together() -> None:
    path = Path(__file__).resolve().parents[2] / "model" / "hippocampus_mr" / "split.json"
    split = read_split(path)
    held_out = {subject_from_consecutive_pair(case) for case in split.validation}
    assert not [case for case in split.train if subject_from_consecutive_pair(case) in held_out]
    assert len(split.validation) > 30
