"""The champion, which is the live version that new weights are compared with, and its recorded scores."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lib.cases.labelled import Case
from lib.cases.split import shipped_split
from lib.configs.preset import Preset
from lib.errors import CheckpointError
from lib.models.versions import check_details, check_shipped_details
from lib.models.weights import WeightsFile, WeightsLocator, preset_for
from lib.networks.checkpoint import Checkpoint, load_weights, read_checkpoint
from lib.networks.unetr import build_unetr
from lib.storage.json_files import read_object
from lib.trainers.material import Material

logger = logging.getLogger("unetr.train")

MOST_TRIED = 24
"""Largest number of new labels on which the live weights are tested; a batch that is wrong as a whole shows in
fewer.
"""


@dataclass(frozen=True)
class ServedWeights:
    """The live weights.

    Attributes:
        version: name of the version.
        checkpoint: the weights.
        judged_on: validation cases of their own judgement.
        labels: digests of the labels at the time of their training, by case; empty for shipped weights.
        reported_dice: recorded mean Dice of the weights, or of their recipe in a cross-validation; NaN if unknown.
        reported_by_label: the same for each label for which it is known.
        never_learnt: labels that none of their training cases annotated, so that no skill can be lost.
        trained_on: their training cases.
    """

    version: str
    checkpoint: Checkpoint
    judged_on: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    reported_dice: float = math.nan
    reported_by_label: Mapping[str, float] = field(default_factory=dict)
    never_learnt: frozenset[str] = frozenset()
    trained_on: frozenset[str] = frozenset()

    def previously_validated(self, labels: Mapping[str, str]) -> frozenset[str]:
        """Validation cases on which they were judged, and whose label has not changed since.

        Args:
            labels: current digest of each case's label.
        """
        return frozenset(case for case in self.judged_on if self._knows(case, labels))

    def new_cases(self, material: Material) -> list[Case]:
        """Training cases of the studies whose label is new or changed since these weights were made, at most 24."""
        new = {
            case.case_id: case
            for case in material.train
            if case.case_id in material.labels and material.labels[case.case_id] != self.labels.get(case.case_id)
        }
        ids = sorted(new)
        return [new[name] for name in (ids if len(ids) <= MOST_TRIED else random.Random(0).sample(ids, MOST_TRIED))]

    def learnt_cases(self, material: Material) -> list[Case]:
        """Training cases whose current label the weights were trained on too, including replayed cases."""
        replayed = set(material.replayed)
        return [
            case
            for case in material.train
            if case.case_id in self.trained_on
            and (case.case_id in replayed or material.labels.get(case.case_id) == self.labels.get(case.case_id, ""))
        ]

    def _knows(self, case: str, labels: Mapping[str, str]) -> bool:
        known = self.labels.get(case)
        return known is None or known == labels.get(case)


def read_served(locator: WeightsLocator, preset: Preset) -> tuple[ServedWeights | None, str]:
    """Read the live weights.

    Returns:
        None if there are no weights, or none that are comparable with this preset; and the reason as a sentence.
    """
    try:
        file = locator.find()
        if file is None:
            return None, ""
        checkpoint = read_checkpoint(file.path)
        load_weights(build_unetr(preset_for(checkpoint, preset)), checkpoint.model)
    except CheckpointError as error:
        logger.warning("the served weights cannot be compared with: %s", error)
        return None, str(error)
    details = _details_of(file)
    measured = _measured(details)
    reported_dice = measured.get("mean_dice")
    return ServedWeights(
        file.version,
        checkpoint,
        _cases_of("validation", file, details, locator),
        details.get("label_digests") or {} if file.origin == "published" else {},
        math.nan if reported_dice is None else float(reported_dice),
        {name: float(dice) for name, dice in (measured.get("dice") or {}).items() if dice is not None},
        frozenset(details.get("never_learnt") or ()) if file.origin == "published" else frozenset(),
        _cases_of("train", file, details, locator),
    ), ""


def _details_of(file: WeightsFile) -> dict[str, Any]:
    """The description of weights; empty if it is damaged."""
    details = read_object(file.side_car)
    try:
        return (check_details if file.origin == "published" else check_shipped_details)(details)
    except ValueError as error:
        logger.warning("nothing is known of the served version %s: %s", file.version, error)
        return {}


def _measured(details: Mapping[str, Any]) -> Mapping[str, Any]:
    """Recorded scores on cases that the weights had not seen; if they saw all cases, scores of their recipe."""
    held_out: Mapping[str, Any] = details.get("held_out") or {}
    return held_out if held_out.get("mean_dice") is not None else details.get("cross_validated") or {}


def _cases_of(
    part: Literal["train", "validation"],
    file: WeightsFile,
    details: Mapping[str, Mapping[str, list[str]]],
    locator: WeightsLocator,
) -> frozenset[str]:
    """The training or validation cases of weights, as far as they are known."""
    if file.origin == "published":
        return frozenset((details.get("split") or {}).get(part, ()))
    shipped = shipped_split(locator.folder) if file.origin == "shipped" else None
    if shipped is None:
        return frozenset()
    return frozenset(shipped.train if part == "train" else shipped.validation)
