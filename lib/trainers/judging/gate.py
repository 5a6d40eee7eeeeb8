"""The gate: new weights (the challenger) are published only if they beat the live ones (the champion).

Both are scored on the same validation cases in the same run, so that the champion is scored again whenever the
validation set has grown. The comparison is paired: the same case and the same label by both models.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lib.cases.metrics import mean_known
from lib.trainers.judging.evaluate import CaseScore, Evaluation
from lib.trainers.judging.likeness import Likeness

Pairs = list[tuple[float, float]]
"""Scores of champion and challenger on the same cases."""

CONTRADICTED = 2 / 3
"""A new label is contradicted if the champion's Dice on it is below this share of its recorded Dice. Such a label does
not count against the champion: either the label is wrong or the image is of another kind, which only a person can
decide. Hippocampi shifted by six voxels have a Dice of 0.17 to 0.44 with themselves; the worst of 45 correct ones had
0.80.
"""

MOST_CONTRADICTED = 0.5
"""Share of contradicted new labels from which on a person must check the whole batch."""

MEDIAN_OF_BATCH = 0.85
"""Share of the champion's recorded Dice below which the median of at least three new labels makes a person check the
batch. Six hippocampi with only the posterior part shifted by six voxels had 0.72; each of 45 correct ones had at least
0.9.
"""

SMALLEST_BATCH = 3

LIKE_BEFORE = 0.8
"""Mean Dice between the masks of both models from which on a label without validation cases counts as unchanged. After
a training on six hippocampi, both models agreed on eight others with a Dice of 0.95 to 0.97 in the anterior part, whose
labels were correct, and of 0.41 to 0.50 in the posterior part, whose labels were shifted by six voxels.
"""

FEWEST_OF_A_LABEL = 2
"""Number of contradicted new labels of one name from which on a person must check them; a single one may be a hard
case.
"""

MOST_NAMED = 8
"""Largest number of labels that a sentence names."""

LOOK = "Look at these labels; if they are right, serve this version by hand"

Status = Literal["published", "rejected", "unproven"]


@dataclass(frozen=True)
class Rules:
    """The conditions for publication.

    Attributes:
        margin: by how much the challenger's mean Dice must exceed the champion's.
        tolerance: by how much the mean Dice or normalised surface distance of one label may fall, on all validation
            cases and on those on which the champion was judged.
    """

    margin: float = 0.001
    tolerance: float = 0.02


@dataclass(frozen=True)
class Champion:
    """The live weights and their scores.

    Attributes:
        scores: scores on the validation cases, computed in this run.
        previously_validated: ids of the validation cases on which the weights were judged when they were published.
            Gains on new labels cannot compensate a loss on these: otherwise, a batch of wrong labels in both the
            training and the validation set would raise the challenger's mean.
        reported_dice: recorded mean Dice; NaN if unknown. Gains on new labels that the champion contradicts are
            ignored.
        on_new: scores on labels that only the challenger was trained on.
        reported_by_label: recorded Dice of each label for which it is known.
        unjudged: labels that the champion was trained on and no validation case annotates.
        likeness: comparison of both models on these labels.
    """

    scores: Evaluation
    previously_validated: Collection[str] = ()
    reported_dice: float = math.nan
    on_new: Evaluation = field(default_factory=lambda: Evaluation(()))
    reported_by_label: Mapping[str, float] = field(default_factory=dict)
    unjudged: Collection[str] = ()
    likeness: Likeness | None = None


@dataclass(frozen=True)
class Verdict:
    """The decision on new weights, its reason as a sentence, and the comparison (empty if there was none).

    ``unproven`` weights could not be judged; they are stored but not served until a person makes them live.
    """

    status: Status
    reason: str
    comparison: Mapping[str, Any] = field(default_factory=dict)

    @property
    def publish(self) -> bool:
        """Whether the weights become live."""
        return self.status == "published"

    @property
    def compared(self) -> bool:
        """Whether they were compared with a champion, on at least one case."""
        return bool(self.comparison)


def judge(challenger: Evaluation, champion: Champion | None, rules: Rules, unusable: str = "") -> Verdict:
    """Compare a challenger with the champion.

    Args:
        challenger: scores of the new weights on the validation cases.
        champion: the live weights; None if there are none.
        rules: the margin and the tolerance.
        unusable: why the configured weights could not be used; empty if they could.
    """
    judged = not math.isnan(challenger.mean_dice)
    if champion is None:
        measured = f"mean Dice {challenger.mean_dice:.4f}" if judged else "no held-out case judges these weights"
        before = f"what was served cannot be used: {unusable}" if unusable else "nothing was served before"
        return Verdict("published", f"published, never compared: {measured}, and {before}")
    agreement = _agreement(champion)
    if not judged:
        words = f"; {agreement['text']}" if agreement else ""
        return Verdict(
            "unproven",
            "unproven: no held-out case has a label to compare on, so nothing judges these weights, and what is served "
            f"stays{words}. A reviewer who has looked may serve this version",
        )
    known = Evaluation(tuple(case for case in champion.scores.cases if case.case_id in champion.previously_validated))
    comparison = compare(challenger, champion.scores)
    on_previously_validated = compare(challenger, known) if known.cases else None
    contradicted = _contradicted(_new_cases(champion), champion.reported_dice)
    problem = (
        _problem(comparison, on_previously_validated, rules)
        or _bought(challenger, champion, contradicted, rules)
        or _doubtful_batch(agreement)
        or _doubtful_label(champion)
    )
    record = comparison | {"familiar": on_previously_validated, "contradicted": [case.case_id for case in contradicted]}
    record |= {"agreement": agreement, "margin": rules.margin, "tolerance": rules.tolerance}
    record |= {"unjudged": _unjudged(champion)}
    if problem:
        return Verdict("rejected", f"rejected: {problem}", record)
    if unproven := _unproven(champion, rules):
        stays = "and what is served stays. A reviewer who has looked may serve this version"
        return Verdict("unproven", f"unproven: {unproven}; {_in_words(comparison)}, {stays}", record)
    return Verdict("published", f"published: {_in_words(comparison)}", record)


def compare(challenger: Evaluation, champion: Evaluation) -> dict[str, Any]:
    """Compare both models on the cases that both were scored on.

    Returns:
        ``cases``; ``dice`` and ``nsd`` by label, and ``mean_dice``, each as ``champion``, ``challenger`` and
        ``difference``; ``per_case``, the mean Dice of each case; ``better_on``, the number of improved cases.
    """
    theirs = {case.case_id: case for case in champion.cases}
    pairs = [(theirs[case.case_id], case) for case in challenger.cases if case.case_id in theirs]
    labels = list(challenger.dice)
    dice = {label: _sides(_paired(pairs, "dice", label)) for label in labels}
    nsd = {label: _sides(_paired(pairs, "nsd", label)) for label in labels}
    mean = {side: mean_known(row[side] for row in dice.values()) for side in ("champion", "challenger", "difference")}
    per_case = {new.case_id: _sides([pair for label in labels for pair in _pair(old, new, "dice", label)])
                for old, new in pairs}  # fmt: skip
    better = sum(row["difference"] > 0 for row in per_case.values())
    return {
        "cases": len(pairs), "mean_dice": mean, "dice": dice, "nsd": nsd, "per_case": per_case, "better_on": better,
    }  # fmt: skip


def _problem(comparison: Mapping[str, Any], on_previously_validated: Mapping[str, Any] | None, rules: Rules) -> str:
    """Why the weights are rejected; empty if there is no reason."""
    mean = comparison["mean_dice"]
    if worse := _label_that_falls(comparison, rules):
        return f"{worse} ({_in_words(comparison)})"
    if not mean["difference"] > rules.margin:
        return f"{_in_words(comparison)} is not above it by more than the margin of {rules.margin:g}"
    if on_previously_validated is None:
        return ""
    was = on_previously_validated["mean_dice"]
    worse = _label_that_falls(on_previously_validated, rules)
    if was["difference"] < -rules.tolerance:
        worse = (
            f"mean Dice falls from {was['champion']:.4f} to {was['challenger']:.4f}, by more than {rules.tolerance:g}"
        )
    cases = on_previously_validated["cases"]
    return (
        worse and f"it gains on new validation cases only: on the {cases} that the served model was judged on, {worse}"
    )


def _label_that_falls(comparison: Mapping[str, Any], rules: Rules) -> str:
    """A sentence on the first label that falls by more than the tolerance; empty if none does."""
    for kind, word in (("dice", "Dice"), ("nsd", "normalised surface distance")):
        for label, row in comparison[kind].items():
            if row["difference"] < -rules.tolerance:
                return (
                    f"the {word} of {label} falls from {row['champion']:.4f} to {row['challenger']:.4f}, by more than "
                    f"the tolerance of {rules.tolerance:g}"
                )
    return ""


def _new_cases(champion: Champion) -> list[CaseScore]:
    """The champion's scores on validation cases on which it was not judged before."""
    return [case for case in champion.scores.cases if case.case_id not in champion.previously_validated]


def _contradicted(cases: Iterable[CaseScore], reported_dice: float) -> list[CaseScore]:
    """New labels that the champion contradicts."""
    return [case for case in cases if case.mean_dice < CONTRADICTED * reported_dice]


def _agreement(champion: Champion) -> dict[str, Any]:
    """The champion's agreement with the new labels of both sets; empty if no label is new.

    Returns:
        ``per_case``, the mean Dice of each case; their ``median``; the ``contradicted`` cases; ``promised``, the
        recorded Dice; and ``text``.
    """
    seen = [*champion.on_new.cases, *_new_cases(champion)]
    new = {case.case_id: case for case in seen if not math.isnan(case.mean_dice)}
    if not new:
        return {}
    contradicted = sorted(case.case_id for case in _contradicted(new.values(), champion.reported_dice))
    median = statistics.median(case.mean_dice for case in new.values())
    before = "" if math.isnan(champion.reported_dice) else f" where {champion.reported_dice:.3f} was measured before"
    return {
        "per_case": {name: case.mean_dice for name, case in sorted(new.items())},
        "median": median,
        "contradicted": contradicted,
        "promised": champion.reported_dice,
        "text": f"the served weights contradict {len(contradicted)} of {len(new)} new labels (median Dice "
        f"{median:.3f}{before})",
    }


def _doubtful_batch(agreement: Mapping[str, Any]) -> str:
    """Why a person must check a batch of new labels; empty if the live weights agree with most of them.

    A validation on few cases can miss the effect of a batch of wrong labels, whereas the champion's prediction is
    available for each of the labels.
    """
    if not agreement:
        return ""
    count = len(agreement["per_case"])
    if len(agreement["contradicted"]) >= MOST_CONTRADICTED * count:
        return f"{agreement['text']}: {', '.join(agreement['contradicted'][:MOST_NAMED])}. {LOOK}"
    if count >= SMALLEST_BATCH and agreement["median"] < MEDIAN_OF_BATCH * agreement["promised"]:
        worst = sorted(agreement["per_case"], key=agreement["per_case"].__getitem__)
        return f"{agreement['text']}, too low for a batch: {', '.join(worst[:MOST_NAMED])}. {LOOK}"
    return ""


def _doubtful_label(champion: Champion) -> str:
    """Why a person must check the new labels of one name, which a mean over many labels would not show."""
    cases = [*champion.on_new.cases, *_new_cases(champion)]
    for label, reported_dice in champion.reported_by_label.items():
        known = {case.case_id: case.dice[label] for case in cases if not math.isnan(case.dice.get(label, math.nan))}
        contradicted = sorted(name for name, dice in known.items() if dice < CONTRADICTED * reported_dice)
        if len(contradicted) >= max(FEWEST_OF_A_LABEL, MOST_CONTRADICTED * len(known)):
            names = ", ".join(contradicted[:MOST_NAMED])
            return (
                f"the served weights contradict {len(contradicted)} of {len(known)} new labels of {label} (median Dice "
                f"{statistics.median(known.values()):.3f} where {reported_dice:.3f} was measured before): "
                f"{names}. {LOOK}"
            )
    return ""


def _unproven(champion: Champion, rules: Rules) -> str:
    """What the comparison cannot show; empty if it covers all labels that the champion was trained on."""
    if math.isnan(champion.reported_dice) and not champion.previously_validated:
        return (
            "nothing is known of how well the served weights do on cases that they were not trained on, so nothing "
            "tells whether they or the new labels are wrong"
        )
    reasons = [why for label in champion.unjudged if (why := _why_unjudged(label, champion.likeness, rules))]
    return f"no held-out case speaks of {'; nor of '.join(reasons)}" if reasons else ""


def _why_unjudged(label: str, likeness: Likeness | None, rules: Rules) -> str:
    """Why nothing shows that a label without validation cases is as good as before; empty if something does."""
    if likeness is None:
        return label
    known = compare(likeness.challenger, likeness.champion)["dice"].get(label)
    if known is not None and known["difference"] < -rules.tolerance:
        return (
            f"{label}, whose Dice on training cases that both have learnt from falls from {known['champion']:.4f} to "
            f"{known['challenger']:.4f}"
        )
    alike = likeness.masks.get(label, math.nan)
    if alike < LIKE_BEFORE:
        return f"{label}, whose masks are not those of before (mean Dice {alike:.3f} on {likeness.images} images)"
    if math.isnan(alike) and (known is None or math.isnan(known["difference"])):
        return f"{label}, which neither model draws on {likeness.images} images"
    return ""


def _unjudged(champion: Champion) -> dict[str, float]:
    """For the record: the Dice between both models' masks for each label that no validation case annotates."""
    masks = champion.likeness.masks if champion.likeness else {}
    return {label: masks.get(label, math.nan) for label in champion.unjudged}


def _bought(challenger: Evaluation, champion: Champion, contradicted: list[CaseScore], rules: Rules) -> str:
    """Why gains on contradicted labels are rejected; empty if the challenger gains on the other labels too."""
    if not contradicted:
        return ""
    rest = Evaluation(tuple(case for case in champion.scores.cases if case not in contradicted))
    on_rest = compare(challenger, rest)
    if on_rest["mean_dice"]["difference"] > rules.margin:
        return ""
    others = f"; on the others, {_in_words(on_rest)}" if rest.cases else ""
    names = ", ".join(case.case_id for case in contradicted[:MOST_NAMED])
    mean = Evaluation(tuple(contradicted)).mean_dice
    return (
        f"it gains only on labels that the served weights contradict: {names}, with a mean Dice of "
        f"{mean:.3f} where {champion.reported_dice:.3f} was measured before{others}. {LOOK}"
    )


def _in_words(comparison: Mapping[str, Any]) -> str:
    mean = comparison["mean_dice"]
    return (
        f"mean Dice {mean['challenger']:.4f} against {mean['champion']:.4f} of the served weights "
        f"({mean['difference']:+.4f}; better on {comparison['better_on']} of {comparison['cases']} cases)"
    )


def _paired(pairs: list[tuple[CaseScore, CaseScore]], kind: str, label: str) -> Pairs:
    return [pair for old, new in pairs for pair in _pair(old, new, kind, label)]


def _pair(old: CaseScore, new: CaseScore, kind: str, label: str) -> Pairs:
    """The scores of one case by both models; empty if neither drew a label that the reference lacks.

    A score is NaN if mask and reference are both empty. If the other model drew a label there, the empty mask counts as
    1 and the other one as 0.
    """
    both = (getattr(old, kind)[label], getattr(new, kind)[label])
    if all(math.isnan(score) for score in both):
        return []
    before, after = (1.0 if math.isnan(score) else score for score in both)
    return [(before, after)]


def _sides(pairs: Pairs) -> dict[str, float]:
    before, after = mean_known(a for a, _ in pairs), mean_known(b for _, b in pairs)
    return {"champion": before, "challenger": after, "difference": after - before}
