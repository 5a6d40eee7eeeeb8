"""What a run trains on, is judged on and is tested on."""

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
    """Cases by side, and why some were left out.

    Attributes:
        train: what an epoch is made of; a case that is oversampled is in it several times.
        validation: what weights are chosen and judged on.
        test: what is only reported on.
        replayed: ids of those of ``train`` that are not of the studies.
        left_out: case id to the reason.
        labels: digest of the label of each labelled case, also of those left out, which tells whether it is new.
    """

    train: tuple[Case, ...]
    validation: tuple[Case, ...] = ()
    test: tuple[Case, ...] = ()
    replayed: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def narrowed(self, kept: Mapping[str, Any]) -> Material:
        """Only the cases of an earlier start of the same run, in its order: labels since then are for the next run.

        Args:
            kept: what :func:`keep_cases` wrote.
        """

        def those(name: str) -> tuple[Case, ...]:
            by_id = {case.case_id: case for case in getattr(self, name)}
            return tuple(by_id[case] for case in kept[name] if case in by_id)

        train, validation, test = those("train"), those("validation"), those("test")
        return replace(self, train=train, validation=validation, test=test, labels=kept["labels"]) if train else self


@dataclass(frozen=True)
class EndedRun:
    """A preset's training that has ended, for what follows it.

    Attributes:
        run: its id.
        material: its cases.
        run_dir: its folder.
        pause_file: what the server touches while requests wait for the device; None where nobody does.
    """

    run: str
    material: Material
    run_dir: Path
    pause_file: Path | None = None


FollowUp = Callable[[EndedRun], Mapping[str, Any]]
"""What is done in the same process after a preset's training; gives plain data for the run's figures."""


def divide(cases: Sequence[Case], split: Split) -> Material:
    """Cases by their side of the split."""
    train, validation, test = (
        tuple(case for case in cases if case.case_id in side) for side in (split.train, split.validation, split.test)
    )
    return Material(train, validation, test)


def read_replay(folder: Path, preset: Preset, shipped: Split | None, held_out: Collection[str]) -> list[Case]:
    """The cases that the shipped weights were trained on, from ``images`` and ``labels`` in a folder.

    Args:
        folder: where they are.
        preset: the task.
        shipped: the split that the shipped weights were trained with; without one, all cases were trained on.
        held_out: ids that are not trained on in this server.

    Raises:
        TrainingError: when there are none.
    """
    images, labels = folder / "images", folder / "labels"
    cases = find_channel_cases(images, labels, preset) if preset.channels else find_cases(images, labels)
    allowed = None if shipped is None else set(shipped.train)
    chosen = [c for c in cases if (allowed is None or c.case_id in allowed) and c.case_id not in held_out]
    if not chosen:
        raise TrainingError(f"--conf replay: none of the {len(cases)} cases in {str(folder)!r} may be trained on")
    return chosen


def weigh(labelled: Sequence[Case], corrected: Collection[str], replay: Iterable[Case], times: int) -> tuple[Case, ...]:
    """An epoch's cases: corrected ones several times, the others and the replayed ones once.

    Where all are corrected and none is replayed, nobody is oversampled: it would only make an epoch longer.

    Args:
        labelled: training cases of the studies.
        corrected: ids of those whose label a person has changed.
        replay: cases from elsewhere; one that has a label here too counts with that one.
        times: how often a corrected case is there.
    """
    here = {case.case_id for case in labelled}
    others = [case for case in replay if case.case_id not in here]
    if not others and here <= set(corrected):
        times = 1
    repeated = [case for case in labelled for _ in range(times if case.case_id in corrected else 1)]
    return (*repeated, *others)


def keep_cases(run_dir: Path, material: Material) -> None:
    """Write down which cases a run has begun with."""
    run_dir.mkdir(parents=True, exist_ok=True)
    sides = {name: [c.case_id for c in getattr(material, name)] for name in ("train", "validation", "test")}
    write_json(run_dir / CASES_FILE, sides | {"labels": dict(material.labels)})


def kept_cases(run_dir: Path) -> dict[str, Any] | None:
    """Which cases a run has begun with; None where it has not.

    Raises:
        TrainingError: when they are written down no more readably.
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
    """The cases' ids, sorted, each once."""
    return sorted({case.case_id for case in cases})
