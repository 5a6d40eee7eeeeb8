"""What an epoch is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.cases.labelled import Case
from lib.cases.split import Split
from lib.cases.studies import corrected_ids, subject_rule
from lib.errors import TrainingError
from lib.trainers.material import CASES_FILE, Material, divide, keep_cases, kept_cases, read_replay, weigh
from tests.tiny import boxes, tiny_preset, write_nifti


def case(name: str) -> Case:
    return Case(name, Path(f"{name}.nii.gz"), Path(f"label_{name}.nii.gz"))


def counts(cases: tuple[Case, ...]) -> dict[str, int]:
    return dict(Counter(one.case_id for one in cases))


def test_corrected_cases_are_trained_on_more_often() -> None:
    labelled = [case("a"), case("b")]
    assert counts(weigh(labelled, {"b"}, [], 3)) == {"a": 1, "b": 3}
    assert counts(weigh(labelled, {"a", "b"}, [case("old")], 3)) == {"a": 3, "b": 3, "old": 1}
    assert counts(weigh(labelled, {"a", "b"}, [], 3)) == {"a": 1, "b": 1}, "all alike: an epoch is no longer for it"
    assert counts(weigh(labelled, set(), [], 3)) == {"a": 1, "b": 1}


def test_label_here_counts_instead_of_a_replayed_one() -> None:
    chosen = weigh([case("a")], {"a"}, [Case("a", Path("x"), Path("old_label")), case("old")], 2)
    assert counts(chosen) == {"a": 2, "old": 1}
    assert {one.label for one in chosen if one.case_id == "a"} == {Path("label_a.nii.gz")}


def test_replay_takes_nothing_that_was_or_is_held_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        for kind, voxels in zip(("images", "labels"), boxes(), strict=True):
            write_nifti(tmp_path / kind / f"{name}.nii.gz", voxels)
    shipped = Split(("a", "b", "c"), ("d",))
    assert [one.case_id for one in read_replay(tmp_path, tiny_preset(), shipped, {"b"})] == ["a", "c"]
    assert [one.case_id for one in read_replay(tmp_path, tiny_preset(), None, ())] == ["a", "b", "c", "d"]
    with pytest.raises(TrainingError, match=r"none of the 4 cases in .* may be trained on"):
        read_replay(tmp_path, tiny_preset(), shipped, {"a", "b", "c"})


def test_run_that_goes_on_has_the_cases_that_it_had(tmp_path: Path) -> None:
    before = Material((case("a"), case("b"), case("b")), (case("v"),), labels={"a": "1", "b": "2", "v": "3"})
    assert kept_cases(tmp_path / "run") is None
    keep_cases(tmp_path / "run", before)
    kept = kept_cases(tmp_path / "run")
    assert kept is not None
    now = Material((case("new"), case("b"), case("a")), (case("v"), case("w")), labels={"new": "9", "a": "1"})
    narrowed = now.narrowed(kept)
    assert [one.case_id for one in narrowed.train] == ["a", "b", "b"]
    assert [one.case_id for one in narrowed.validation] == ["v"]
    assert dict(narrowed.labels) == {"a": "1", "b": "2", "v": "3"}, "what came since is new to the next run"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"train": 1, "validation": [], "test": [], "labels": {}}', "[" * 100_000]
)
def test_run_whose_cases_are_damaged_says_so(tmp_path: Path, text: str) -> None:
    keep_cases(tmp_path, Material((case("a"),), (case("b"),), ()))
    assert kept_cases(tmp_path) is not None and kept_cases(tmp_path / "none") is None
    (tmp_path / CASES_FILE).write_text(text)
    with pytest.raises(TrainingError, match="cannot be read"):
        kept_cases(tmp_path)


def test_sides_follow_the_split() -> None:
    found = divide([case(name) for name in "abcd"], Split(("a", "c"), ("b",), ("d",)))
    assert [[one.case_id for one in side] for side in (found.train, found.validation, found.test)] == [
        ["a", "c"],
        ["b"],
        ["d"],
    ]


class Studies(SimpleNamespace):
    def get_image_info(self, image: str) -> dict[str, str]:
        return self.info.get(image, {})


def test_subject_is_the_patient_where_there_is_one() -> None:
    studies = Studies(info={"a-1": {"PatientID": "P7"}, "b-1": {"PatientID": "P7"}})
    subject_of = subject_rule(studies, [case("a-1"), case("b-1"), case("c-1")], "-")
    assert subject_of("a-1") == subject_of("b-1") == "patient P7"
    assert [subject_of("c-1"), subject_of("c-2"), subject_of("d")] == ["c", "c", "d"]


def test_corrected_are_those_whose_voxels_a_person_changed() -> None:
    latest = [
        SimpleNamespace(image_id=name, voxels_changed=changed) for name, changed in (("a", 0), ("b", 7), ("c", None))
    ]
    studies = Studies(history=SimpleNamespace(all_latest=lambda tag: latest, is_kept=lambda version: True))
    assert corrected_ids(studies, ["a", "b", "c", "d"]) == {"b", "c", "d"}
    assert corrected_ids(Studies(), ["a", "b"]) == {"a", "b"}, "a store that does not know"
