"""Which cases are trained on and which are held out, by subject, so that a subject is never on both sides."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lib.errors import TrainingError

SPLIT_FILE = "split.json"
RUNS_FOLDER = "runs"
MIN_CASES_FOR_VALIDATION = 5
MIN_CASES_FOR_TEST = 50


@dataclass(frozen=True)
class Split:
    """Case ids by part, sorted.

    Attributes:
        train: what is trained on.
        validation: what weights are chosen and judged on.
        test: what nothing is decided on.
        subjects: a digest of each case's subject, so that a subject is known again when its first case is gone.
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


def subject_from_stem(case_id: str) -> str:
    """Each file is a subject of its own."""
    return case_id


def subject_until(separator: str) -> Callable[[str], str]:
    """The rule that what stands before the first ``separator`` names the subject: p017 of p017_t1 and p017_t2."""
    return lambda case_id: case_id.split(separator)[0] if separator else case_id


def subject_from_consecutive_pair(case_id: str) -> str:
    """Ids 2k-1 and 2k are one subject, as in the Decathlon's hippocampus data (two hippocampi of one head).

    Raises:
        TrainingError: when the id does not end in a number.
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
) -> Split:
    """Assign cases that are not assigned yet; what is assigned stays where it is.

    A new subject's side follows from a hash of its name, so that it does not depend on who else arrives. The first
    fewer than five cases are all trained on: a validation of one or two cases would only look like one. As soon as
    there are five and still nothing is held out, the new subject of the lowest hash is. Subjects go to the test side
    from fifty cases on.

    Args:
        known: the split so far.
        case_ids: ids of all labelled cases.
        validation_share: expected share of new subjects held out, 0 to 1; 0 holds out none.
        subject_of: subject of a case id.
        test_share: expected share of new subjects on the test side.

    Returns:
        A split of the known and the given cases. New cases of a subject that is on a side already go there.
    """
    ids = set(case_ids)
    everybody = ids | {*known.train, *known.validation, *known.test}
    subjects = {case: known.subjects.get(case) or _digest(subject_of(case)) for case in everybody}
    held_out = {subjects[case] for case in known.validation}
    tested = {subjects[case] for case in known.test} - held_out
    trained_on = {subjects[case] for case in known.train} - held_out - tested
    new = {subjects[case] for case in ids} - held_out - tested - trained_on
    if validation_share > 0 and len(everybody) >= MIN_CASES_FOR_VALIDATION:
        held_out |= _choose_validation(new, validation_share, bool(held_out), bool(trained_on))
    if len(everybody) >= MIN_CASES_FOR_TEST:
        tested |= {s for s in new - held_out if validation_share <= _position(s) < validation_share + test_share}
    assigned = {*known.train, *known.validation, *known.test}
    validation = {case for case in everybody - assigned if subjects[case] in held_out} | set(known.validation)
    test = {case for case in everybody - assigned if subjects[case] in tested} | set(known.test)
    train = everybody - validation - test
    return Split(tuple(sorted(train)), tuple(sorted(validation)), tuple(sorted(test)), subjects)


def _choose_validation(new: set[str], share: float, has_validation: bool, has_training: bool) -> set[str]:
    """The new subjects to hold out: at least one where there is none yet, and not all where nobody is trained on."""
    chosen = {subject for subject in new if _position(subject) < share}
    if new and not has_validation and not chosen:
        chosen = {min(new, key=_position)}
    if new and chosen == new and not has_training:
        chosen = new - {max(new, key=_position)}
    return chosen


def read_split(path: Path) -> Split:
    """Read a persisted split.

    Raises:
        TrainingError: when the file is not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        test, subjects = tuple(data.get("test", ())), dict(data.get("subjects", {}))
        return Split(tuple(data["train"]), tuple(data["validation"]), test, subjects)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"split file {str(path)!r} cannot be used: {error}") from error


def known_split(folder: Path) -> Split:
    """Who is held out in a preset's folder: the server's own split, else that of the shipped weights, else nobody."""
    files = (folder / RUNS_FOLDER / SPLIT_FILE, folder / SPLIT_FILE)
    return next((read_split(path) for path in files if path.is_file()), Split((), ()))


def write_split(path: Path, split: Split, how: str) -> None:
    """Write a split with a sentence on how it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    sides = {"train": list(split.train), "validation": list(split.validation), "test": list(split.test)}
    data = {"how": how} | sides | {"subjects": dict(split.subjects)}
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _digest(subject: str) -> str:
    """What stands for a subject in the file, whose name (a patient's id, say) is nobody else's business."""
    return hashlib.sha256(subject.encode()).hexdigest()[:16]


def _position(digest: str) -> float:
    """A subject's fixed place between 0 and 1."""
    return int(digest, 16) / 2**64
