"""Labels that no validation case speaks of: what new weights make of them, beside what the served ones do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lib.cases.labelled import Case, read_image
from lib.cases.metrics import dice_per_label, mean_per_label
from lib.infers.segmenter import Segmenter
from lib.trainers.judging.evaluate import Evaluation, evaluate

MOST_LOOKED_AT = 8
"""Images that both models' masks are compared on, and cases that both have learnt from."""


@dataclass(frozen=True)
class Likeness:
    """Champion and challenger where no label held out can tell which of them is right.

    Attributes:
        masks: mean Dice between the masks of both, by label, over the images where one of them draws it; NaN where
            neither does.
        images: how many images that is.
        champion: its scores on training cases whose labels both have learnt from.
        challenger: the same of the challenger.
    """

    masks: Mapping[str, float]
    images: int
    champion: Evaluation = field(default_factory=lambda: Evaluation(()))
    challenger: Evaluation = field(default_factory=lambda: Evaluation(()))


def unjudged_labels(challenger: Evaluation, champion: Evaluation) -> tuple[str, ...]:
    """Labels that no case judges: none of them speaks of it, or it is nowhere and nobody draws it."""
    names = champion.dice or challenger.dice
    both = (challenger.dice, champion.dice)
    return tuple(name for name in names if all(math.isnan(scores.get(name, math.nan)) for scores in both))


def compare_masks(
    challenger: Segmenter, champion: Segmenter, images: Iterable[Case], learnt_by_both: Sequence[Case]
) -> Likeness:
    """Segment the same images with both models.

    Args:
        challenger: the new weights.
        champion: the served ones.
        images: cases whose images are segmented, whatever their labels say; the first eight of them.
        learnt_by_both: training cases with labels that both have learnt from; the first eight of them.

    Raises:
        InputError: when a case cannot be read.
    """
    rows = []
    for case in list({case.case_id: case for case in images}.values())[:MOST_LOOKED_AT]:
        volume = read_image(case, challenger.preset)
        new, old = (model.segment(volume, name=case.case_id).labels for model in (challenger, champion))
        rows.append(dice_per_label(new, old, challenger.preset.label_indices))
    known = list({case.case_id: case for case in learnt_by_both}.values())[:MOST_LOOKED_AT]
    return Likeness(mean_per_label(rows), len(rows), evaluate(champion, known), evaluate(challenger, known))
