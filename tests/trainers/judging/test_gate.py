"""The gate: better on the same cases, by more than a margin, with no label paying for it."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest

from lib.trainers.judging.evaluate import CaseScore, Evaluation
from lib.trainers.judging.gate import Champion, Rules, Verdict, compare
from lib.trainers.judging.gate import judge as judge_champion

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
    reported_dice: float = math.nan, on_new: Evaluation | None = None,
) -> Verdict:  # fmt: skip
    served = (
        None if champion is None else Champion(champion, previously_validated, reported_dice, on_new or Evaluation(()))
    )
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
    assert judge(challenger, champion, RULES, on_new=wrong).publish, "nothing is known of the champion"


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
    assert judge(challenger, champion, RULES).publish, "nothing is known of the champion"
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
