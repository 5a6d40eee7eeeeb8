"""Compares new and live weights on labels that no validation case annotates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lib.cases.labelled import Case, read_image
from lib.cases.metrics import dice_per_label, mean_per_label
from lib.infers.segmenter import Segmenter
from lib.trainers.judging.evaluate import Evaluation, evaluate

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
    challenger: Segmenter, champion: Segmenter, images: Iterable[Case], learnt_by_both: Sequence[Case]
) -> Likeness:
    """Segment the same images with both models.

    Args:
        challenger: the new weights.
        champion: the live weights.
        images: cases whose images are segmented, whatever their labels; the first eight are used.
        learnt_by_both: training cases with labels that both were trained on; the first eight are used.

    Raises:
        InputError: if a case cannot be read.
    """
    rows = []
    for case in list({case.case_id: case for case in images}.values())[:MOST_LOOKED_AT]:
        volume = read_image(case, challenger.preset)
        new, old = (model.segment(volume, name=case.case_id).labels for model in (challenger, champion))
        rows.append(dice_per_label(new, old, challenger.preset.label_indices))
    known = list({case.case_id: case for case in learnt_by_both}.values())[:MOST_LOOKED_AT]
    return Likeness(mean_per_label(rows), len(rows), evaluate(champion, known), evaluate(challenger, known))
