"""The policy: a pure function from what is known to whether to train, with its reason in words."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import pytest

from lib.configs.retraining import Retraining
from lib.trainers.retrain import History, Label, decide

NOW = datetime.datetime(2026, 3, 4, 12, 0, tzinfo=datetime.timezone.utc).timestamp()


def history(labels: int = 12, new: int = 5, age: float = 1000, settings: dict[str, Any] | None = None, **known: Any):
    """A history with so many labels, of which the last ``new`` are unknown to the last run."""
    policy = Retraining(**({"retrain_quiet_seconds": 60} | (settings or {})))
    all_labels = {f"case_{n}": Label(f"digest{n}", NOW - age) for n in range(labels)}
    seen = {name: label.digest for name, label in list(all_labels.items())[: labels - new]}
    base = {"last_version": "v0003", "last_run_at": NOW - 7200, "runs": 3, "serving": True}
    return History(policy, NOW, all_labels, seen, **(base | known))


def test_enough_new_labels_are_trained_on() -> None:
    decision = decide(history(new=5))
    assert (decision.train, decision.new_labels, decision.from_nothing) == (True, 5, False)
    assert decision.reason == "5 labels are new or changed, and 5 are enough"


def test_fewer_wait() -> None:
    decision = decide(history(new=4))
    assert (decision.train, decision.reason) == (False, "4 labels are new or changed; waits for 5")
    assert not decide(history(new=0)).train
    assert decide(history(new=0)).reason == "no label is new since v0003"


def test_changed_label_counts_as_a_new_one() -> None:
    known = history(new=0)
    changed = dict(known.labels) | {f"case_{n}": Label("corrected", NOW - 500) for n in range(5)}
    assert decide(replace(known, labels=changed)).train
    removed = {name: label for name, label in known.labels.items() if name not in ("case_0", "case_1")}
    assert decide(replace(known, labels=removed)).new_labels == 0


def test_live_model_that_does_badly_on_new_labels_is_trained_before() -> None:
    assert not decide(history(new=1, dice_on_new=0.7)).train
    decision = decide(history(new=1, dice_on_new=0.31))
    assert decision.train
    assert decision.reason == "the served model has a mean Dice of 0.310 on 1 new labels, below 0.5"
    assert not decide(history(new=1, dice_on_new=0.31, settings={"retrain_floor": 0})).train


def test_run_waits_until_it_is_quiet() -> None:
    decision = decide(history(age=20))
    assert not decision.train
    assert decision.wait_seconds == pytest.approx(40)
    assert decision.reason == "5 labels are new or changed, and 5 are enough; waits until no label has come in for 60 s"
    assert decide(history(age=61)).train


def test_one_run_at_a_time() -> None:
    decision = decide(history(running=True))
    assert not decision.train
    assert "a training runs; labels that come in meanwhile are for the next one" in decision.reason


def test_off_trains_by_hand_only() -> None:
    decision = decide(history(settings={"retrain": "off"}))
    assert not decision.train
    assert decision.reason.startswith("retraining is off")


def test_few_labels_do_not_replace_what_has_been_proven() -> None:
    assert decide(history(labels=4, new=4, settings={"retrain_after": 2}, serving=False)).train
    decision = decide(history(labels=4, new=4, settings={"retrain_after": 2}))
    assert not decision.train
    assert "4 labels: with fewer than 5 nothing is held out" in decision.reason


@pytest.mark.parametrize(
    ("failures", "minutes_ago", "train"), [(0, 0, True), (1, 9, False), (1, 11, True), (3, 30, False), (3, 41, True)]
)
def test_failed_runs_are_tried_again_later_and_later(failures: int, minutes_ago: int, train: bool) -> None:
    decision = decide(history(failures=failures, failed_at=NOW - 60 * minutes_ago))
    assert decision.train is train
    assert train or f"{failures} runs have failed" in decision.reason


@pytest.mark.parametrize(
    ("runs", "every", "from_nothing"), [(8, 10, False), (9, 10, True), (9, 0, False), (0, 1, True)]
)
def test_every_kth_run_starts_from_nothing(runs: int, every: int, from_nothing: bool) -> None:
    decision = decide(history(runs=runs, settings={"retrain_from_nothing": every}))
    assert decision.train
    assert decision.from_nothing is from_nothing
    assert ("from nothing" in decision.reason) is from_nothing


@pytest.mark.parametrize(
    ("at", "hours_since_run", "hours_since_label", "train"),
    [
        ("11:30", 24, 5, True),  # it is 12:00: the time has come since both
        ("11:30", 24, 0.4, False),  # the label came after it
        ("11:30", 0.2, 5, False),  # it has run since
        ("12:30", 24, 5, False),  # not yet
        ("12:30", 48, 30, True),  # but yesterday's time has passed
    ],
)
def test_schedule_trains_once_a_day_where_labels_are_new(
    at: str, hours_since_run: float, hours_since_label: float, train: bool
) -> None:
    settings = {"retrain": "schedule", "retrain_at": at}
    last = NOW - 3600 * hours_since_run
    decision = decide(history(new=1, age=3600 * hours_since_label, settings=settings, last_run_at=last))
    assert decision.train is train
    assert train or f"the next run is at {at}" in decision.reason
    assert train or decision.wait_seconds is not None


def test_schedule_is_in_the_servers_time_zone() -> None:
    settings = {"retrain": "schedule", "retrain_at": "14:30"}
    known = history(new=1, age=3600 * 5, settings=settings, last_run_at=NOW - 86400)
    assert not decide(known).train
    assert decide(replace(known, utc_offset_seconds=3 * 3600)).train, "12:00 UTC is 15:00 there"


def test_decision_depends_on_nothing_but_the_history() -> None:
    known = history()
    assert decide(known) == decide(replace(known))
