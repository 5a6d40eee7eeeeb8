"""The gate: better on the same cases, by more than a margin, with no label paying for it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest

from lib.trainers.judging.evaluate import CaseScore, Evaluation
from lib.trainers.judging.gate import Champion, Rules, Verdict, compare
from lib.trainers.judging.gate import judge as judge_champion
from lib.trainers.judging.likeness import Likeness, unjudged_labels

RULES = Rules(margin=0.01, tolerance=0.05)


def scores(nsd: float = 0.9, **cases: tuple[float, float]) -> Evaluation:
    """Dice of the labels x and y by case; the same normalised surface distance everywhere."""
    return Evaluation(
        tuple(
            CaseScore(name, {"x": x, "y": y}, {"x": 1.0, "y": 1.0}, {"x": nsd, "y": nsd})
            for name, (x, y) in cases.items()
        )
    )


def judge(
    challenger: Evaluation, champion: Evaluation | None, rules: Rules, previously_validated: Collection[str] = (),
    reported_dice: float = 0.3, on_new: Evaluation | None = None, **more: Any,
) -> Verdict:  # fmt: skip
    """Served weights of which so little was measured that no label contradicts it, unless given."""
    if champion is None:
        return judge_champion(challenger, None, rules)
    served = Champion(champion, previously_validated, reported_dice, on_new or Evaluation(()), **more)
    return judge_champion(challenger, served, rules)


CHAMPION = scores(a=(0.80, 0.70), b=(0.90, 0.80))


@pytest.mark.parametrize(
    ("challenger", "publish", "reason"),
    [
        (scores(a=(0.82, 0.72), b=(0.92, 0.82)), True, r"published: mean Dice 0\.8200 against 0\.8000 .*\+0\.0200; "
         r"better on 2 of 2 cases"),
        (scores(a=(0.81, 0.71), b=(0.90, 0.80)), False, r"rejected: .*\+0\.0050.* by more than the margin of 0\.01"),
        (scores(a=(0.80, 0.70), b=(0.90, 0.80)), False, r"rejected: .*margin"),
        (scores(a=(0.70, 0.60), b=(0.80, 0.70)), False, r"rejected: the Dice of x falls from 0\.8500 to 0\.7500"),
        (scores(a=(0.99, 0.63), b=(0.99, 0.75)), False, r"rejected: the Dice of y falls from 0\.7500 to 0\.6900, by "
         r"more than the tolerance of 0\.05"),
        (scores(a=(0.99, 0.66), b=(0.99, 0.75)), True, r"published"),
        (scores(nsd=0.84, a=(0.9, 0.8), b=(0.95, 0.9)), False, r"rejected: the normalised surface distance of x falls "
         r"from 0\.9000 to 0\.8400"),
        (scores(nsd=0.86, a=(0.9, 0.8), b=(0.95, 0.9)), True, r"published"),
    ],
)  # fmt: skip
def test_challenger_must_be_better_and_pay_with_no_label(challenger: Evaluation, publish: bool, reason: str) -> None:
    import re

    verdict = judge(challenger, CHAMPION, RULES)
    assert verdict.publish is publish
    assert re.match(reason, verdict.reason), verdict.reason
    assert verdict.compared


def test_first_model_is_served_and_says_that_it_was_never_compared() -> None:
    first = judge(CHAMPION, None, RULES)
    assert (first.status, first.compared) == ("published", False)
    assert first.reason == "published, never compared: mean Dice 0.8000, and nothing was served before"
    unjudged = judge(Evaluation(()), None, RULES)
    assert unjudged.publish
    assert unjudged.reason == (
        "published, never compared: no held-out case judges these weights, and nothing was served before"
    )
    broken = judge_champion(CHAMPION, None, RULES, unusable="it is damaged")
    assert broken.reason.endswith("what was served cannot be used: it is damaged")


@pytest.mark.parametrize("empty", [Evaluation(()), scores(a=(math.nan, math.nan))])
def test_weights_that_nothing_judges_stay_beside_the_served_ones(empty: Evaluation) -> None:
    verdict = judge(empty, empty, RULES)
    assert (verdict.status, verdict.publish, verdict.compared) == ("unproven", False, False)
    assert verdict.reason.startswith("unproven: no held-out case has a label to compare on, so nothing judges")
    shifted = scores(s1=(0.3, 0.2), s2=(0.2, 0.2), s3=(0.4, 0.3))
    doubted = judge(empty, empty, RULES, reported_dice=0.886, on_new=shifted)
    assert "contradict 3 of 3 new labels (median Dice 0.250 where 0.886 was measured before)" in doubted.reason


def test_label_may_not_fall_on_the_familiar_cases_either() -> None:
    """The mean over both labels stays there, and new cases lift the mean of the label over all."""
    champion = scores(a=(0.8, 0.8), b=(0.8, 0.8), new=(0.5, 0.5))
    challenger = scores(a=(0.9, 0.72), b=(0.9, 0.72), new=(0.7, 0.7))
    assert judge(challenger, champion, RULES).publish
    verdict = judge(challenger, champion, RULES, previously_validated={"a", "b"})
    assert verdict.reason == (
        "rejected: it gains on new validation cases only: on the 2 that the served model was judged on, the Dice of y "
        "falls from 0.8000 to 0.7200, by more than the tolerance of 0.05"
    )


def test_batch_that_the_served_weights_contradict_is_for_somebody_to_look_at() -> None:
    """One case judges, and gains; the labels that were trained on tell that the batch is wrong."""
    champion, challenger = scores(a=(0.66, 0.66)), scores(a=(0.70, 0.70))
    wrong = scores(s1=(0.3, 0.2), s2=(0.2, 0.2), s3=(0.4, 0.3), s4=(0.3, 0.1), s5=(0.6, 0.6))
    known = {"previously_validated": {"a"}, "reported_dice": 0.66}
    assert judge(challenger, champion, RULES, **known).publish
    verdict = judge(challenger, champion, RULES, **known, on_new=wrong)
    assert verdict.reason == (
        "rejected: the served weights contradict 4 of 5 new labels (median Dice 0.250 where 0.660 was measured "
        "before): s1, s2, s3, s4. Look at these labels; if they are right, serve this version by hand"
    )
    assert verdict.comparison["agreement"]["contradicted"] == ["s1", "s2", "s3", "s4"]
    hard = scores(s1=(0.6, 0.6), s2=(0.7, 0.6), s3=(0.4, 0.4), s4=(0.6, 0.5))
    assert judge(challenger, champion, RULES, **known, on_new=hard).publish, "a hard case is what there is to learn"


def test_batch_that_the_served_weights_half_agree_with_is_for_somebody_to_look_at() -> None:
    """Labels shifted by three voxels contradict nothing alone; five of them do."""
    champion, challenger = scores(a=(0.88, 0.88)), scores(a=(0.92, 0.92))
    known = {"previously_validated": {"a"}, "reported_dice": 0.886}
    shifted = scores(s1=(0.66, 0.66), s2=(0.7, 0.7), s3=(0.62, 0.62), s4=(0.68, 0.68), s5=(0.9, 0.9))
    verdict = judge(challenger, champion, RULES, **known, on_new=shifted)
    assert verdict.reason == (
        "rejected: the served weights contradict 0 of 5 new labels (median Dice 0.680 where 0.886 was measured "
        "before), too low for a batch: s3, s1, s4, s2, s5. Look at these labels; if they are right, serve this version "
        "by hand"
    )
    two = scores(s1=(0.66, 0.66), s2=(0.7, 0.7))
    assert judge(challenger, champion, RULES, **known, on_new=two).publish, "two may be hard cases"
    hardest = scores(s1=(0.80, 0.80), s2=(0.76, 0.76), s3=(0.5, 0.9))
    assert judge(challenger, champion, RULES, **known, on_new=hardest).publish


def test_wrong_labels_of_one_name_are_seen_among_right_ones_of_others() -> None:
    """Posterior parts shifted by six voxels: the mean over both labels contradicts nothing."""
    champion, challenger = scores(a=(0.9, 0.88)), scores(a=(0.94, 0.92))
    known = {"previously_validated": {"a"}, "reported_dice": 0.7, "reported_by_label": {"x": 0.89, "y": 0.88}}
    shifted = scores(s1=(0.9, 0.40), s2=(0.88, 0.38), s3=(0.91, 0.41), s4=(0.9, 0.88))
    verdict = judge(challenger, champion, RULES, **known, on_new=shifted)
    assert verdict.reason == (
        "rejected: the served weights contradict 3 of 4 new labels of y (median Dice 0.405 where 0.880 was measured "
        "before): s1, s2, s3. Look at these labels; if they are right, serve this version by hand"
    )
    one = scores(s1=(0.9, 0.40), s2=(0.88, 0.87), s3=(0.91, 0.88))
    assert judge(challenger, champion, RULES, **known, on_new=one).publish, "one may be a hard case"
    silent = scores(s1=(0.9, math.nan), s2=(0.88, math.nan))
    assert judge(challenger, champion, RULES, **known, on_new=silent).publish, "they do not speak of it"


def test_weights_beside_served_ones_of_which_nothing_is_known_are_unproven() -> None:
    """Either may be wrong: the served weights, or all of the new labels."""
    champion, challenger = scores(a=(0.3, 0.4), b=(0.2, 0.2)), scores(a=(0.7, 0.7), b=(0.7, 0.7))
    verdict = judge(challenger, champion, RULES, reported_dice=math.nan)
    assert (verdict.status, verdict.compared) == ("unproven", True)
    assert verdict.reason.startswith("unproven: nothing is known of how well the served weights do on cases that they")
    assert "+0.4250" in verdict.reason and verdict.reason.endswith("A reviewer who has looked may serve this version")
    assert judge(challenger, champion, RULES, {"a", "b"}, math.nan).publish, "these were right when they were judged"
    assert judge(champion, challenger, RULES, reported_dice=math.nan).status == "rejected"


SILENT = {name: (dice, math.nan) for name, dice in (("a", 0.8), ("b", 0.9))}
SILENT_BUT_BETTER = {name: (dice, math.nan) for name, dice in (("a", 0.85), ("b", 0.95))}


@pytest.mark.parametrize(
    ("likeness", "status", "reason"),
    [
        (Likeness({"y": 0.93}, 8), "published", "mean Dice 0.9000"),
        (Likeness({"y": 0.45}, 8), "unproven", "of y, whose masks are not those of before (mean Dice 0.450 on 8 "),
        (Likeness({"y": 0.0}, 2), "unproven", "of y, whose masks are not those of before (mean Dice 0.000 on 2 "),
        (Likeness({"y": math.nan}, 8), "unproven", "speaks of y, which neither model draws on 8 images"),
        (None, "unproven", "no held-out case speaks of y; mean Dice"),
        (Likeness({"y": 0.93}, 8, scores(t=(0.9, 0.9)), scores(t=(0.9, 0.8))), "unproven",
         "speaks of y, whose Dice on training cases that both have learnt from falls from 0.9000 to 0.8000"),
        (Likeness({"y": 0.45}, 8, scores(t=(0.9, 0.9)), scores(t=(0.9, 0.9))), "unproven", "not those of before"),
        (Likeness({"y": math.nan}, 8, scores(t=(0.9, 0.9)), scores(t=(0.9, 0.9))), "published", "mean Dice"),
        (Likeness({"y": 0.93}, 8, scores(t=(0.9, 0.9)), scores(t=(0.9, 0.95))), "published", "mean Dice"),
    ],
)  # fmt: skip
def test_label_that_no_held_out_case_speaks_of_is_protected(
    likeness: Likeness | None, status: str, reason: str
) -> None:
    champion, challenger = scores(**SILENT), scores(**SILENT_BUT_BETTER)
    assert unjudged_labels(challenger, champion) == ("y",)
    verdict = judge(challenger, champion, RULES, unjudged=["y"], likeness=likeness)
    assert verdict.status == status
    assert reason in verdict.reason, verdict.reason
    assert set(verdict.comparison["unjudged"]) == {"y"}


def test_gain_on_new_cases_does_not_pay_for_a_loss_on_the_familiar_ones() -> None:
    champion = scores(a=(0.9, 0.9), b=(0.9, 0.9), poisoned=(0.2, 0.2))
    challenger = scores(a=(0.84, 0.84), b=(0.84, 0.84), poisoned=(0.5, 0.5))
    assert judge(challenger, champion, RULES).publish, "its mean is higher"
    verdict = judge(challenger, champion, RULES, previously_validated={"a", "b"})
    assert not verdict.publish
    assert verdict.reason == (
        "rejected: it gains on new validation cases only: on the 2 that the served model was judged on, mean Dice "
        "falls from 0.9000 to 0.8400, by more than 0.05"
    )
    assert verdict.comparison["familiar"]["cases"] == 2
    a_little = scores(a=(0.88, 0.88), b=(0.88, 0.88), poisoned=(0.5, 0.5))
    assert judge(a_little, champion, RULES, previously_validated={"a", "b"}).publish, (
        "within what chance does to few cases"
    )


def test_gain_on_labels_that_the_champion_contradicts_is_for_somebody_to_look_at() -> None:
    champion, challenger = scores(a=(0.3, 0.4), b=(0.2, 0.2)), scores(a=(0.7, 0.7), b=(0.7, 0.7))
    assert judge(challenger, champion, RULES, reported_dice=0.29).publish, "no worse than it usually is"
    assert judge(challenger, champion, RULES, previously_validated={"a", "b"}, reported_dice=0.9).publish, (
        "hard cases, known as such"
    )
    verdict = judge(challenger, champion, RULES, reported_dice=0.876)
    assert not verdict.publish
    assert verdict.reason == (
        "rejected: it gains only on labels that the served weights contradict: a, b, with a mean Dice of 0.275 where "
        "0.876 was measured before. Look at these labels; if they are right, serve this version by hand"
    )
    assert verdict.comparison["contradicted"] == ["a", "b"]
    others = {name: (0.9, 0.8) for name in "cde"}
    with_good_ones = scores(a=(0.3, 0.4), b=(0.2, 0.2), **others)
    better = scores(a=(0.7, 0.7), b=(0.7, 0.7), **{name: (0.92, 0.84) for name in "cde"})
    assert judge(better, with_good_ones, RULES, reported_dice=0.876).publish
    no_better = judge(scores(a=(0.7, 0.7), b=(0.7, 0.7), **others), with_good_ones, RULES, reported_dice=0.876)
    assert not no_better.publish
    assert "; on the others, mean Dice 0.8500 against 0.8500 of the served weights" in no_better.reason


def test_comparison_is_paired_over_cases() -> None:
    challenger = scores(b=(0.95, 0.75), a=(0.80, 0.72), new=(0.1, 0.1))
    found = compare(challenger, CHAMPION)
    assert (found["cases"], found["better_on"]) == (2, 1), "b as a whole is neither better nor worse"
    assert found["mean_dice"]["champion"] == pytest.approx(0.8)
    assert found["mean_dice"]["challenger"] == pytest.approx((0.875 + 0.735) / 2), (
        "a case that only one has is left out"
    )
    assert found["dice"]["x"]["difference"] == pytest.approx(0.025)
    assert found["dice"]["y"]["difference"] == pytest.approx(-0.015)
    assert found["per_case"]["b"]["difference"] == pytest.approx(0)


def test_label_drawn_where_there_is_none_counts_against_whoever_drew_it() -> None:
    """NaN is "nothing there, and nothing drawn": right, where the other model drew something."""
    careful, careless = scores(a=(0.8, math.nan), b=(0.8, 0.8)), scores(a=(0.8, 0.0), b=(0.8, 0.8))
    found = compare(careless, careful)
    assert found["dice"]["y"]["champion"] == pytest.approx(0.9)
    assert found["dice"]["y"]["challenger"] == pytest.approx(0.4)
    assert not judge(careless, careful, RULES).publish
    assert judge(careful, careless, RULES).publish
    nobody = compare(careful, careful)
    assert nobody["dice"]["y"]["champion"] == pytest.approx(0.8), "neither drew it: no pair"
