"""Compares new and live weights on labels that no validation case annotates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lib.cases.labelled import Case
from lib.cases.metrics import dice_per_label, mean_per_label
from lib.trainers.judging.evaluate import Evaluation, evaluate
from lib.trainers.judging.masks import CaseMasks

MOST_LOOKED_AT = 8
"""Number of images whose masks are compared, and of training cases of both models that are scored."""


@dataclass(frozen=True)
class Likeness:
    """Comparison of champion and challenger without held-out labels.

    Attributes:
        masks: mean Dice between both models' masks, by label, over the images in which at least one of them has the
            label; NaN if none has.
        images: the number of these images.
        champion: the champion's scores on training cases with labels that both were trained on.
        challenger: the challenger's scores on the same cases.
    """

    masks: Mapping[str, float]
    images: int
    champion: Evaluation = field(default_factory=lambda: Evaluation(()))
    challenger: Evaluation = field(default_factory=lambda: Evaluation(()))


def unjudged_labels(challenger: Evaluation, champion: Evaluation) -> tuple[str, ...]:
    """Labels that no case judges: none of them annotates the label, or it occurs in no reference and no mask."""
    names = champion.dice or challenger.dice
    both = (challenger.dice, champion.dice)
    return tuple(name for name in names if all(math.isnan(scores.get(name, math.nan)) for scores in both))


def compare_masks(
    challenger: CaseMasks, champion: CaseMasks, images: Iterable[Case], learnt_by_both: Sequence[Case]
) -> Likeness:
    """Compare the masks of the same images by both models.

    Args:
        challenger: masks of the new weights.
        champion: masks of the live weights.
        images: cases whose images are segmented, whatever their labels; the first eight are used.
        learnt_by_both: training cases with labels that both were trained on; the first eight are used.

    Raises:
        InputError: if a case cannot be read.
    """
    rows = []
    for case in list({case.case_id: case for case in images}.values())[:MOST_LOOKED_AT]:
        new, old = challenger.of(case), champion.of(case)
        rows.append(dice_per_label(new.labels, old.labels, challenger.preset.label_indices))
    known = list({case.case_id: case for case in learnt_by_both}.values())[:MOST_LOOKED_AT]
    return Likeness(mean_per_label(rows), len(rows), evaluate(champion, known), evaluate(challenger, known))
