"""The split of cases into training, validation and test sets, by subject, so that no subject is in two sets."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.errors import TrainingError
from lib.storage.json_files import read_json, write_json

SPLIT_FILE = "split.json"
RUNS_FOLDER = "runs"
MIN_CASES_FOR_VALIDATION = 5
MIN_CASES_FOR_TEST = 50
MOST_HELD_OUT = 0.5
"""Largest share of the labelled subjects that is held out, unless the expected share is larger."""


@dataclass(frozen=True)
class Split:
    """The sorted case ids of each set.

    Attributes:
        train: cases used for training.
        validation: cases by which weights are chosen and judged.
        test: cases on which no decision depends.
        subjects: a digest of each case's subject, so that a subject is recognised after its first case has been
            deleted.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] = ()
    subjects: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sides = {"training": set(self.train), "validation": set(self.validation), "test": set(self.test)}
        for (name, one), (other_name, other) in itertools.combinations(sides.items(), 2):
            if one & other:
                raise TrainingError(f"cases {sorted(one & other)[:5]} are in both {name} and {other_name}")


class _SplitFile(BaseModel):
    """A split as stored in a file; subjects are digests from :func:`_digest`."""

    model_config = ConfigDict(strict=True)

    train: list[str]
    validation: list[str]
    test: list[str] = []
    subjects: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]] = {}


def subject_from_stem(case_id: str) -> str:
    """Rule by which each case is its own subject, named by its id."""
    return case_id


def subject_until(separator: str) -> Callable[[str], str]:
    """Rule by which the subject is the part of a case id before ``separator``: p017 of p017_t1 and p017_t2."""
    return lambda case_id: case_id.split(separator)[0] if separator else case_id


def subject_from_consecutive_pair(case_id: str) -> str:
    """Rule by which ids 2k-1 and 2k are one subject, as in the Decathlon's hippocampus data (two sides of one head).

    Raises:
        TrainingError: if the id does not end in a number.
    """
    match = re.search(r"(\d+)$", case_id)
    if not match:
        raise TrainingError(f"case id {case_id!r} does not end in a number, which consecutive pairs need")
    return f"{case_id[: match.start()]}{(int(match[1]) + 1) // 2}"


SUBJECT_RULES: Mapping[str, Callable[[str], str]] = {
    "stem": subject_from_stem,
    "consecutive-pairs": subject_from_consecutive_pair,
}


def extend_split(
    known: Split,
    case_ids: Iterable[str],
    validation_share: float,
    subject_of: Callable[[str], str] = subject_from_stem,
    test_share: float = 0.0,
    shipped: Split | None = None,
) -> Split:
    """Assign new cases to the sets; cases that are assigned already keep their sets.

    Only labelled cases of the studies are counted. With fewer than five cases, all are used for training, because a
    validation on one or two cases has no significance. From five cases on, at least one subject is held out, and at
    most half of the subjects (or the share, if it is larger). They are chosen by a hash of the subject, so that the
    choice hardly depends on the other subjects. From fifty cases on, subjects are also assigned to the test set.

    A case changes its set in one situation only: if all labelled cases are held out, some are moved to the training
    set.

    Args:
        known: the current split of this server.
        case_ids: ids of the labelled cases of the studies.
        validation_share: expected share of new subjects in the validation set, from 0 to 1; 0 for none.
        subject_of: maps a case id to its subject.
        test_share: expected share of new subjects in the test set.
        shipped: the split of the weights that come with the project. Their training cases are never used to judge
            weights; their validation cases are held out before others.

    Returns:
        A split of the current and the new cases. New cases of an assigned subject join its set.
    """
    ids = set(case_ids)
    elsewhere = shipped or Split((), ())
    everybody = ids | {*known.train, *known.validation, *known.test}
    subjects = {case: known.subjects.get(case) or _digest(subject_of(case)) for case in everybody}
    seen_elsewhere = {_digest(subject_of(case)) for case in elsewhere.train}
    held_out = {subjects[case] for case in known.validation}
    tested = {subjects[case] for case in known.test} - held_out
    trained_on = {subjects[case] for case in known.train} | seen_elsewhere
    new = {subjects[case] for case in ids} - held_out - tested - trained_on
    if validation_share > 0 and len(ids) >= MIN_CASES_FOR_VALIDATION:
        here = {subjects[case] for case in ids}
        first = {subjects[case] for case in ids & set(elsewhere.validation)}
        held_out |= _choose_validation(new, first, here, held_out, validation_share)
    if len(ids) >= MIN_CASES_FOR_TEST:
        tested |= {s for s in new - held_out if validation_share <= _position(s) < validation_share + test_share}
    assigned = {*known.train, *known.validation, *known.test}
    never = {case for case in everybody if subjects[case] in seen_elsewhere} - assigned
    validation = {case for case in everybody - assigned - never if subjects[case] in held_out} | set(known.validation)
    test = {case for case in everybody - assigned - never if subjects[case] in tested} | set(known.test)
    return _with_training(_split_of(everybody, validation, test, subjects), ids, validation_share)


def _split_of(everybody: set[str], validation: set[str], test: set[str], subjects: Mapping[str, str]) -> Split:
    train = everybody - validation - test
    return Split(tuple(sorted(train)), tuple(sorted(validation)), tuple(sorted(test)), subjects)


def _choose_validation(new: set[str], first: set[str], here: set[str], held_out: set[str], share: float) -> set[str]:
    """Choose the new subjects of the validation set.

    Args:
        new: subjects that are not assigned yet.
        first: subjects that are held out before others.
        here: subjects of the labelled cases.
        held_out: subjects in the validation set.
        share: expected share.
    """
    most = min(len(here) - 1, max(1, int(len(here) * max(share, MOST_HELD_OUT))))
    room = max(0, most - len(held_out & here))
    wanted = {subject for subject in new if subject in first or _position(subject) < share}
    if new and not wanted and not held_out & here:
        wanted = {min(new, key=_position)}
    return set(sorted(wanted, key=lambda subject: (subject not in first, _position(subject)))[:room])


def _with_training(split: Split, ids: set[str], share: float) -> Split:
    """The split, with some subjects moved to the training set if otherwise all labelled cases would be held out."""
    if not ids or ids & set(split.train):
        return split
    subjects = sorted({split.subjects[case] for case in ids}, key=_position)
    few = len(ids) < MIN_CASES_FOR_VALIDATION
    moved = set(subjects if few else subjects[max(1, int(len(subjects) * min(share, MOST_HELD_OUT))) :] or subjects)
    validation, test = (
        {case for case in side if split.subjects[case] not in moved} for side in (split.validation, split.test)
    )
    return _split_of({*split.train, *split.validation, *split.test}, validation, test, split.subjects)


def read_split(path: Path) -> Split:
    """Read a stored split.

    Raises:
        TrainingError: if the file is not a valid split.
    """
    try:
        data = _SplitFile.model_validate(read_json(path))
        return Split(tuple(data.train), tuple(data.validation), tuple(data.test), data.subjects)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "it"
        raise TrainingError(f"split file {str(path)!r} cannot be used: {where}: {problem['msg']}") from error
    except (OSError, ValueError) as error:
        raise TrainingError(f"split file {str(path)!r} cannot be used: {error}") from error


def nothing_judges(labels: int, serving: bool) -> str:
    """A sentence for the case that no case is held out: what it means for the new weights."""
    count = "1 label" if labels == 1 else f"{labels} labels"
    few = "fewer than five" if labels < MIN_CASES_FOR_VALIDATION else "none of them held out"
    after = (
        "what is served stays until a reviewer serves the new version"
        if serving
        else "it is served, because nothing else is"
    )
    return f"{count}, {few}: all are trained on, and nothing judges the result; {after}"


def known_split(folder: Path) -> Split:
    """The current split of this server, from a preset's folder; empty before the first training."""
    path = folder / RUNS_FOLDER / SPLIT_FILE
    return read_split(path) if path.is_file() else Split((), ())


def shipped_split(folder: Path) -> Split | None:
    """The split with which the shipped weights of a preset's folder were trained; None if it is unknown."""
    path = folder / SPLIT_FILE
    return read_split(path) if path.is_file() else None


def write_split(path: Path, split: Split, how: str) -> None:
    """Write a split, with a sentence on how it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = {"train": list(split.train), "validation": list(split.validation), "test": list(split.test)}
    data = {"how": how} | sides | {"subjects": dict(split.subjects)}
    write_json(path, data)


def _digest(subject: str) -> str:
    """A digest that replaces the subject's name in the file, since the name may be a patient's id."""
    return hashlib.sha256(subject.encode()).hexdigest()[:16]


def _position(digest: str) -> float:
    """A subject's fixed pseudo-random number between 0 and 1."""
    return int(digest, 16) / 2**64
