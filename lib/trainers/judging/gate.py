"""The gate: a challenger is published only if it beats the champion on the same validation cases.

Both are scored on the same cases in the same run, however old the champion is, so a validation set that has grown
scores the champion anew. What is compared is paired over cases: the same case, the same label, both models.
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
"""Scores of the same cases by champion and challenger."""

CONTRADICTED = 2 / 3
"""A new label on which the champion's Dice is below this share of what it was measured at is left out of its defeat:
either the label is wrong or the image is of another kind, and only somebody who looks can tell. Hippocampi that are
shifted by six voxels keep 0.17 to 0.44 of Dice with themselves; the worst of 45 right ones had 0.80."""

MOST_CONTRADICTED = 0.5
"""From this share of contradicted new labels on, the batch as a whole is for somebody to look at."""

MEDIAN_OF_BATCH = 0.85
"""Share of the champion's measured Dice below which the median of a batch of at least three new labels is for somebody
to look at. Six hippocampi with the posterior part alone shifted by six voxels had 0.72 of it; each of 45 right ones had
at least 0.9."""

SMALLEST_BATCH = 3

LIKE_BEFORE = 0.8
"""Mean Dice between both models' masks of a label that no case judges, from which on it counts as unchanged. After a
training on six hippocampi, eight others agreed by 0.95 to 0.97 in the anterior part, whose labels were right, and by
0.41 to 0.50 in the posterior part, whose labels were shifted by six voxels."""

FEWEST_OF_A_LABEL = 2
"""Contradicted new labels of one name from which on they are for somebody to look at; one may be a hard case."""

MOST_NAMED = 8
"""Labels that a sentence names."""

LOOK = "Look at these labels; if they are right, serve this version by hand"

Status = Literal["published", "rejected", "unproven"]


@dataclass(frozen=True)
class Rules:
    """What a challenger must do.

    Attributes:
        margin: how much its mean Dice must be above the champion's.
        tolerance: how much the mean Dice or normalised surface distance of one label may fall, on all validation cases
            and on those that the champion was judged on.
    """

    margin: float = 0.001
    tolerance: float = 0.02


@dataclass(frozen=True)
class Champion:
    """What is known of the weights that are served.

    Attributes:
        scores: theirs on the validation cases, in this run.
        previously_validated: ids of the validation cases that they were judged on when they were published. New
            labels cannot pay for a loss on these: a batch of wrong labels that lands on both sides of the split would
            otherwise raise the challenger's mean.
        reported_dice: mean Dice that they were measured at before; NaN where that is not known. Gains on new labels
            that they contradict count for nothing.
        on_new: their scores on labels that the challenger was trained on and they were not.
        reported_by_label: the Dice that they were measured at before, of each label that it is known of.
        unjudged: labels that they have learnt and no validation case speaks of.
        likeness: what both models make of those.
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
    """What becomes of new weights, why in words, and the comparison that it comes from (empty where there was none).

    ``unproven`` weights are kept beside the served ones, because nothing judges them, until a person serves them.
    """

    status: Status
    reason: str
    comparison: Mapping[str, Any] = field(default_factory=dict)

    @property
    def publish(self) -> bool:
        """Whether they are served from now on."""
        return self.status == "published"

    @property
    def compared(self) -> bool:
        """Whether there was a champion to compare with, on at least one case."""
        return bool(self.comparison)


def judge(challenger: Evaluation, champion: Champion | None, rules: Rules, unusable: str = "") -> Verdict:
    """Compare a challenger with the champion.

    Args:
        challenger: its scores on the validation cases.
        champion: the served weights; None where nothing is served.
        rules: the margin and the tolerance.
        unusable: why what was to be served could not be, where there was something.
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
    """Both models on the cases that both were scored on.

    Returns:
        ``cases``; ``dice`` and ``nsd`` by label, and ``mean_dice``, each as ``champion``, ``challenger`` and
        ``difference``; ``per_case`` mean Dice; ``better_on``, the number of cases.
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
    """Why not to publish; empty if there is no reason."""
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
    """In words, the first label that falls by more than the tolerance; empty if none does."""
    for kind, word in (("dice", "Dice"), ("nsd", "normalised surface distance")):
        for label, row in comparison[kind].items():
            if row["difference"] < -rules.tolerance:
                return (
                    f"the {word} of {label} falls from {row['champion']:.4f} to {row['challenger']:.4f}, by more than "
                    f"the tolerance of {rules.tolerance:g}"
                )
    return ""


def _new_cases(champion: Champion) -> list[CaseScore]:
    """The champion's scores on validation cases that it was not judged on before."""
    return [case for case in champion.scores.cases if case.case_id not in champion.previously_validated]


def _contradicted(cases: Iterable[CaseScore], reported_dice: float) -> list[CaseScore]:
    """New labels that the champion contradicts."""
    return [case for case in cases if case.mean_dice < CONTRADICTED * reported_dice]


def _agreement(champion: Champion) -> dict[str, Any]:
    """How well the champion agrees with the labels that are new to it, of both sides; empty where none is new.

    Returns:
        ``per_case`` mean Dice, their ``median``, the ``contradicted`` ones, what was ``promised``, and ``text``.
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
    """The reason why a person should check a batch of new labels; empty where the served weights agree with most.

    A validation of few cases can miss what a batch of wrong labels does. The champion's opinion of the labels is there
    for each of them.
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
    """Why the new labels of one name are for somebody to look at: in a mean over many labels it would not show."""
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
    """What the comparison cannot tell; empty where it tells of all labels that the champion has learnt."""
    if math.isnan(champion.reported_dice) and not champion.previously_validated:
        return (
            "nothing is known of how well the served weights do on cases that they were not trained on, so nothing "
            "tells whether they or the new labels are wrong"
        )
    reasons = [why for label in champion.unjudged if (why := _why_unjudged(label, champion.likeness, rules))]
    return f"no held-out case speaks of {'; nor of '.join(reasons)}" if reasons else ""


def _why_unjudged(label: str, likeness: Likeness | None, rules: Rules) -> str:
    """Why nothing shows that a label which no validation case speaks of is as good as before; empty where it shows."""
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
    """For the record: how alike the masks are of each label that no validation case speaks of."""
    masks = champion.likeness.masks if champion.likeness else {}
    return {label: masks.get(label, math.nan) for label in champion.unjudged}


def _bought(challenger: Evaluation, champion: Champion, contradicted: list[CaseScore], rules: Rules) -> str:
    """Why a challenger that gains on contradicted labels is not published; empty where it gains on the others too."""
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
    """One case's scores by both; none where neither drew a label that the reference lacks.

    A score is NaN where mask and reference are both empty. If only the other model drew something there, that is a
    full score against nothing.
    """
    both = (getattr(old, kind)[label], getattr(new, kind)[label])
    if all(math.isnan(score) for score in both):
        return []
    before, after = (1.0 if math.isnan(score) else score for score in both)
    return [(before, after)]


def _sides(pairs: Pairs) -> dict[str, float]:
    before, after = mean_known(a for a, _ in pairs), mean_known(b for _, b in pairs)
    return {"champion": before, "challenger": after, "difference": after - before}
