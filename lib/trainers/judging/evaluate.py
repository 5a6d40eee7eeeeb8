"""Evaluates a model under clinical conditions: from image file to mask on the image's own grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

from lib.cases.labelled import Case, read_case
from lib.cases.metrics import dice_per_label, mean_known, mean_per_label, surface_per_label
from lib.models.calibration import Calibration, fit
from lib.trainers.judging.masks import CaseMasks

logger = logging.getLogger("unetr.evaluate")


@dataclass(frozen=True)
class CaseScore:
    """Dice, HD95 (mm) and normalised surface distance of a case by label, and the model's uncertainty."""

    case_id: str
    dice: dict[str, float]
    hd95_mm: dict[str, float]
    nsd: dict[str, float]
    uncertainty: float = math.nan

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the labels; NaN if no label has a score."""
        return mean_known(self.dice.values())


@dataclass(frozen=True)
class Evaluation:
    """Scores of several cases."""

    cases: tuple[CaseScore, ...]

    @property
    def dice(self) -> dict[str, float]:
        """Mean Dice of each label."""
        return mean_per_label([case.dice for case in self.cases])

    @property
    def hd95_mm(self) -> dict[str, float]:
        """Mean HD95 of each label in millimetres, over the cases in which both masks have the label."""
        return mean_per_label([case.hd95_mm for case in self.cases])

    @property
    def nsd(self) -> dict[str, float]:
        """Mean normalised surface distance of each label."""
        return mean_per_label([case.nsd for case in self.cases])

    @property
    def mean_dice(self) -> float:
        """Mean over labels of each label's mean Dice over the cases; labels without a score are ignored."""
        return mean_known(self.dice.values())

    def calibration(self) -> Calibration | None:
        """The regression from uncertainty to Dice; None if there are too few cases."""
        return fit([(case.uncertainty, case.mean_dice) for case in self.cases])

    def summary(self) -> dict[str, object]:
        """Data for a side-car; ``per_case`` is each case's mean Dice over labels."""
        return {
            "cases": len(self.cases),
            "mean_dice": round(self.mean_dice, 4),
            "dice": {name: round(value, 4) for name, value in self.dice.items()},
            "hd95_mm": {name: round(value, 3) for name, value in self.hd95_mm.items()},
            "nsd": {name: round(value, 4) for name, value in self.nsd.items()},
            "per_case": {case.case_id: round(case.mean_dice, 4) for case in self.cases},
        }


def evaluate(masks: CaseMasks, cases: Iterable[Case]) -> Evaluation:
    """Score the mask of each case, with a surface tolerance of the network's largest voxel edge.

    Raises:
        InputError: if a case cannot be read.
    """
    scores = []
    indices, tolerance_mm = masks.preset.label_indices, max(masks.preset.spacing_mm)
    for case in cases:
        volume, reference = read_case(case, masks.preset)
        mask = masks.of(case, volume)
        known = {name: index for name, index in indices.items() if index not in case.missing}
        dice = dice_per_label(mask.labels, reference, known)
        hd95, nsd = surface_per_label(mask.labels, reference, known, volume.spacing_mm, tolerance_mm)
        dice, hd95, nsd = ({name: score.get(name, math.nan) for name in indices} for score in (dice, hd95, nsd))
        scores.append(CaseScore(case.case_id, dice, hd95, nsd, mask.uncertainty))
        logger.info("%s dice %s", case.case_id, {k: round(v, 3) for k, v in dice.items()})
    return Evaluation(tuple(scores))
