"""Gathers the cases of a training run: labels, split, replayed cases, and weights of corrected cases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.cases.labelled import Case, read_case
from lib.cases.split import (
    RUNS_FOLDER,
    SPLIT_FILE,
    Split,
    extend_split,
    known_split,
    nothing_judges,
    shipped_split,
    write_split,
)
from lib.cases.studies import corrected_ids, subject_rule
from lib.configs.preset import Preset
from lib.configs.retraining import Retraining
from lib.errors import InputError, TrainingError
from lib.models.provenance import label_digests
from lib.trainers.material import Material, divide, ids_of, keep_cases, kept_cases, read_replay, weigh
from lib.trainers.request import TrainRequest
from lib.trainers.submitted import SubmittedLabels, submitted_labels, undrawn_as_missing

logger = logging.getLogger("unetr.train")


class CaseGatherer:
    """Gathers the training, validation and test cases of a run.

    Args:
        preset: the preset.
        folder: folder of the preset's weights and runs; the split is stored there.
        settings: shares of the split, oversampling and replay.
        served: names of all presets of this server, whose labels are excluded.
        is_serving: whether there are weights for inference.
    """

    def __init__(
        self,
        preset: Preset,
        folder: Path,
        settings: Retraining,
        served: Collection[str],
        is_serving: Callable[[], bool],
    ) -> None:
        self._preset, self._folder, self._settings = preset, folder, settings
        self._served, self._is_serving = tuple(served), is_serving

    def labels(self, datastore: Any) -> SubmittedLabels:
        """The datastore's final labels for this preset."""
        return submitted_labels(datastore, self._preset, self._served)

    def gather(self, datastore: Any, request: TrainRequest, run_dir: Path) -> Material:
        """Gather the training, validation and test cases, and record them in the run's folder.

        Args:
            datastore: MONAI Label's datastore.
            request: the request; a resumed run keeps its original cases.
            run_dir: folder of the run.

        Raises:
            TrainingError: if there is no usable case.
        """
        labelled = self.labels(datastore)
        usable, left_out = self._usable(labelled)
        for name, reason in left_out.items():
            logger.warning("left out %s: %s", name, reason)
        if not usable:
            why = f"; {len(left_out)} labels cannot be used: {next(iter(left_out.values()))}" if left_out else ""
            raise TrainingError(f"there is no usable labelled case for {self._preset.name!r}{why}")
        split = self._extend_split(datastore, usable, request.val_split)
        material = divide(usable, split)
        logger.info("%d training, %d validation, %d test cases", *map(len, (material.train, material.validation,
                                                                             material.test)))  # fmt: skip
        if not material.validation:
            logger.warning("%s", nothing_judges(len(usable), self._is_serving()))
        replay = self._replay(split)
        corrected = corrected_ids(datastore, ids_of(material.train))
        train = weigh(material.train, corrected, replay, self._settings.oversample)
        replayed = tuple(sorted(set(ids_of(train)) - set(ids_of(material.train))))
        material = replace(
            material, train=train, replayed=replayed, left_out=left_out, labels=label_digests(labelled.cases)
        )
        kept = kept_cases(run_dir) if request.resume else None
        if kept is not None:
            return material.narrowed(kept)
        keep_cases(run_dir, material)
        return material

    def _replay(self, split: Split) -> list[Case]:
        if self._settings.replay is None:
            return []
        held_out = {*split.validation, *split.test}
        return read_replay(self._settings.replay, self._preset, shipped_split(self._folder), held_out)

    def _extend_split(self, datastore: Any, cases: Sequence[Case], validation_share: float) -> Split:
        """Assign new cases to a set permanently."""
        split = self.plan_split(datastore, cases, validation_share)
        write_split(
            self._folder / RUNS_FOLDER / SPLIT_FILE,
            split,
            f"hash of the subject, {validation_share:g} of new subjects held out; append-only",
        )
        return split

    def plan_split(self, datastore: Any, cases: Sequence[Case], validation_share: float) -> Split:
        """The split including new cases; it is not written yet."""
        return extend_split(
            known_split(self._folder),
            ids_of(cases),
            validation_share,
            subject_rule(datastore, cases, self._settings.subject_separator),
            self._settings.test_share,
            shipped_split(self._folder),
        )

    def _usable(self, labels: SubmittedLabels) -> tuple[list[Case], dict[str, str]]:
        """Read every case once, so that one bad label among a thousand does not end a run."""
        usable, left_out = [], dict(labels.left_out)
        for case in labels.cases:
            try:
                _, label = read_case(case, self._preset)
            except InputError as error:
                left_out[case.case_id] = str(error)
                continue
            known = case if case.case_id in labels.complete else undrawn_as_missing(case, label, self._preset)
            if len(known.missing) < len(self._preset.labels):
                usable.append(known)
            else:
                left_out[case.case_id] = f"label of {case.case_id!r} speaks of none of the labels"
        return usable, left_out
