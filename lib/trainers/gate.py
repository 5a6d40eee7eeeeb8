"""The gate: a challenger is published only if it beats the champion on the same validation cases.

Both are scored on the same cases in the same run, however old the champion is, so a validation set that has grown
scores the champion anew. What is compared is paired over cases: the same case, the same label, both models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.cases.metrics import mean_known
from lib.trainers.evaluate import CaseScore, Evaluation

Pairs = list[tuple[float, float]]
"""Scores of the same cases by champion and challenger."""

CONTRADICTED = 2 / 3
"""A new label on which the champion's Dice is below this share of what it was measured at is left out of its defeat:
either the label is wrong or the image is of another kind, and only somebody who looks can tell. Hippocampi that are
shifted by six voxels keep 0.17 to 0.44 of Dice with themselves; the worst of 45 right ones had 0.80."""


@dataclass(frozen=True)
class Rules:
    """What a challenger must do.

    Attributes:
        margin: how much its mean Dice must be above the champion's.
        tolerance: how much the mean Dice or normalised surface distance of one label may fall, and the mean Dice on
            the cases that the champion was judged on.
    """

    margin: float = 0.001
    tolerance: float = 0.02


@dataclass(frozen=True)
class Verdict:
    """Whether to publish, why in words, and the comparison that it comes from (empty where there was none)."""

    publish: bool
    reason: str
    comparison: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compared(self) -> bool:
        """Whether there was a champion to compare with, on at least one case."""
        return bool(self.comparison)


def judge(
    challenger: Evaluation,
    champion: Evaluation | None,
    rules: Rules,
    familiar: Collection[str] = (),
    promised: float = math.nan,
) -> Verdict:
    """Compare a challenger with the champion.

    Args:
        challenger: its scores on the validation cases.
        champion: the served weights' scores on the same cases; None where nothing is served.
        rules: the margin and the tolerance.
        familiar: ids of the validation cases that the champion itself was judged on. New labels cannot pay for a
            loss on these: a batch of wrong labels that lands on both sides of the split would otherwise raise the
            challenger's mean.
        promised: mean Dice that the champion was measured at before; NaN where that is not known. Gains on new labels
            that it contradicts count for nothing.
    """
    if math.isnan(challenger.mean_dice):
        return Verdict(True, "published without a comparison: no validation case has a label to compare on")
    if champion is None:
        return Verdict(True, f"published: mean Dice {challenger.mean_dice:.4f}, and nothing was served before")
    known = Evaluation(tuple(case for case in champion.cases if case.case_id in familiar))
    comparison = compare(challenger, champion)
    on_familiar = compare(challenger, known) if known.cases else None
    contradicted = _contradicted(champion, familiar, promised)
    problem = _problem(comparison, on_familiar, rules) or _bought(challenger, champion, contradicted, promised, rules)
    said = comparison | {"familiar": on_familiar, "contradicted": [case.case_id for case in contradicted]}
    said |= {"margin": rules.margin, "tolerance": rules.tolerance}
    return Verdict(not problem, f"rejected: {problem}" if problem else f"published: {_in_words(comparison)}", said)


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


def _problem(comparison: Mapping[str, Any], on_familiar: Mapping[str, Any] | None, rules: Rules) -> str:
    """Why not to publish; empty if there is no reason."""
    mean = comparison["mean_dice"]
    for kind, word in (("dice", "Dice"), ("nsd", "normalised surface distance")):
        for label, row in comparison[kind].items():
            if row["difference"] < -rules.tolerance:
                return (
                    f"the {word} of {label} falls from {row['champion']:.4f} to {row['challenger']:.4f}, by more than "
                    f"the tolerance of {rules.tolerance:g} ({_in_words(comparison)})"
                )
    if not mean["difference"] > rules.margin:
        return f"{_in_words(comparison)} is not above it by more than the margin of {rules.margin:g}"
    if on_familiar and on_familiar["mean_dice"]["difference"] < -rules.tolerance:
        was = on_familiar["mean_dice"]
        return (
            f"it gains on new validation cases only: on the {on_familiar['cases']} that the served model was judged "
            f"on, mean Dice falls from {was['champion']:.4f} to {was['challenger']:.4f}, by more than "
            f"{rules.tolerance:g}"
        )
    return ""


def _contradicted(champion: Evaluation, familiar: Collection[str], promised: float) -> list[CaseScore]:
    """New labels that the champion contradicts."""
    new = (case for case in champion.cases if case.case_id not in familiar)
    return [case for case in new if case.mean_dice < CONTRADICTED * promised]


def _bought(
    challenger: Evaluation, champion: Evaluation, contradicted: list[CaseScore], promised: float, rules: Rules
) -> str:
    """Why a challenger that gains on contradicted labels is not published; empty where it gains on the others too."""
    if not contradicted:
        return ""
    rest = Evaluation(tuple(case for case in champion.cases if case not in contradicted))
    on_rest = compare(challenger, rest)
    if on_rest["mean_dice"]["difference"] > rules.margin:
        return ""
    others = f"; on the others, {_in_words(on_rest)}" if rest.cases else ""
    names = ", ".join(case.case_id for case in contradicted)
    return (
        f"it gains only on labels that the served weights contradict: {names}, with a mean Dice "
        f"of {Evaluation(tuple(contradicted)).mean_dice:.3f} where {promised:.3f} was measured before{others}. Look at "
        "these labels; if they are right, serve this version by hand"
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
