"""The training, validation and test cases of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib.cases.labelled import Case, find_cases, find_channel_cases
from lib.cases.split import Split
from lib.configs.preset import Preset
from lib.errors import TrainingError
from lib.storage.json_files import read_json, write_json

CASES_FILE = "cases.json"


@dataclass(frozen=True)
class Material:
    """Cases by set, and the reasons why some were left out.

    Attributes:
        train: cases of an epoch; an oversampled case occurs several times.
        validation: cases by which weights are chosen and judged.
        test: cases that are only reported.
        replayed: ids of the cases in ``train`` that do not belong to the studies.
        left_out: case id to reason.
        labels: digest of the label of each labelled case, including cases that were left out, by which new labels are
            recognised.
    """

    train: tuple[Case, ...]
    validation: tuple[Case, ...] = ()
    test: tuple[Case, ...] = ()
    replayed: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def narrowed(self, kept: Mapping[str, Any]) -> Material:
        """The cases of the first start of the same run, in the same order; later labels are left for the next run.

        Args:
            kept: the record that :func:`keep_cases` wrote.
        """

        def those(name: str) -> tuple[Case, ...]:
            by_id = {case.case_id: case for case in getattr(self, name)}
            return tuple(by_id[case] for case in kept[name] if case in by_id)

        train, validation, test = those("train"), those("validation"), those("test")
        return replace(self, train=train, validation=validation, test=test, labels=kept["labels"]) if train else self


@dataclass(frozen=True)
class EndedRun:
    """A finished training of a preset, for the follow-up.

    Attributes:
        run: id of the run.
        material: cases of the run.
        run_dir: folder of the run.
        pause_file: file that the server touches while requests wait for the device; None without a server.
    """

    run: str
    material: Material
    run_dir: Path
    pause_file: Path | None = None


FollowUp = Callable[[EndedRun], Mapping[str, Any]]
"""A task that runs in the same process after a preset's training, and returns data for the run's figures."""


def divide(cases: Sequence[Case], split: Split) -> Material:
    """The cases by their set in the split."""
    train, validation, test = (
        tuple(case for case in cases if case.case_id in side) for side in (split.train, split.validation, split.test)
    )
    return Material(train, validation, test)


def read_replay(folder: Path, preset: Preset, shipped: Split | None, held_out: Collection[str]) -> list[Case]:
    """The cases on which the shipped weights were trained, from ``images`` and ``labels`` in a folder.

    Args:
        folder: the folder of both.
        preset: the preset.
        shipped: the split of the shipped weights; None if they were trained on all cases.
        held_out: ids of cases that this server holds out.

    Raises:
        TrainingError: if there are no such cases.
    """
    images, labels = folder / "images", folder / "labels"
    cases = find_channel_cases(images, labels, preset) if preset.channels else find_cases(images, labels)
    allowed = None if shipped is None else set(shipped.train)
    chosen = [c for c in cases if (allowed is None or c.case_id in allowed) and c.case_id not in held_out]
    if not chosen:
        raise TrainingError(f"--conf replay: none of the {len(cases)} cases in {str(folder)!r} may be trained on")
    return chosen


def weigh(labelled: Sequence[Case], corrected: Collection[str], replay: Iterable[Case], times: int) -> tuple[Case, ...]:
    """The cases of an epoch: corrected ones several times, other and replayed ones once.

    If all cases are corrected and none is replayed, no case is oversampled, since this would only lengthen the epoch.

    Args:
        labelled: training cases of the studies.
        corrected: ids of the cases whose label a person has changed.
        replay: cases of the shipped training; a case that is also labelled here counts once, with the label of this
            server.
        times: how often a corrected case occurs.
    """
    here = {case.case_id for case in labelled}
    others = [case for case in replay if case.case_id not in here]
    if not others and here <= set(corrected):
        times = 1
    repeated = [case for case in labelled for _ in range(times if case.case_id in corrected else 1)]
    return (*repeated, *others)


def keep_cases(run_dir: Path, material: Material) -> None:
    """Record the cases with which a run began."""
    run_dir.mkdir(parents=True, exist_ok=True)
    sides = {name: [c.case_id for c in getattr(material, name)] for name in ("train", "validation", "test")}
    write_json(run_dir / CASES_FILE, sides | {"labels": dict(material.labels)})


def kept_cases(run_dir: Path) -> dict[str, Any] | None:
    """The cases with which a run began; None if it has not begun.

    Raises:
        TrainingError: if the record cannot be read.
    """
    path = run_dir / CASES_FILE
    try:
        kept: dict[str, Any] = read_json(path)
        sides = [kept[name] for name in ("train", "validation", "test")] + [list(kept["labels"])]
        if not all(isinstance(case, str) for side in sides for case in side):
            raise TypeError("a case has no name")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"the cases of run {run_dir.name!r} cannot be read: {error}; train anew") from error
    return kept


def ids_of(cases: Iterable[Case]) -> list[str]:
    """The sorted, distinct ids of the cases."""
    return sorted({case.case_id for case in cases})
