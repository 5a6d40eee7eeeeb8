"""The retraining policy, which decides whether to train now, and states the reason."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field

from lib.cases.split import MIN_CASES_FOR_VALIDATION
from lib.configs.retraining import Retraining

SECONDS_AFTER_FAILURE = 600.0
LONGEST_AFTER_FAILURE = 86_400.0


@dataclass(frozen=True)
class Label:
    """A label: the digest of its content, and the time at which it was saved (seconds since 1970)."""

    digest: str
    saved_at: float


@dataclass(frozen=True)
class History:
    """Everything on which the decision depends.

    Attributes:
        settings: settings of the policy.
        now: current time, in seconds since 1970.
        labels: the labels, by image id.
        seen: digests of the labels at the time of the last run, by image id, whether its version was published or
            rejected.
        last_version: name of the version that the last run made; empty if there was no run.
        last_run_at: end of the last run.
        runs: number of runs that ended with a version.
        running: whether a training is running or waiting.
        waits_for_room: whether a training was stopped by a full disk; it resumes by itself when there is space.
        serving: whether there are live weights.
        dice_on_new: mean Dice of the live weights on new labels; None if it was not computed.
        failures: number of failed runs since the last version.
        failed_at: time of the last failure.
        utc_offset_seconds: UTC offset of the server's time zone.
    """

    settings: Retraining
    now: float
    labels: Mapping[str, Label] = field(default_factory=dict)
    seen: Mapping[str, str] = field(default_factory=dict)
    last_version: str = ""
    last_run_at: float = 0.0
    runs: int = 0
    running: bool = False
    waits_for_room: bool = False
    serving: bool = False
    dice_on_new: float | None = None
    failures: int = 0
    failed_at: float = 0.0
    utc_offset_seconds: float = 0.0

    @property
    def new(self) -> dict[str, Label]:
        """Labels that are new or changed since the last run."""
        return {name: label for name, label in self.labels.items() if self.seen.get(name) != label.digest}


@dataclass(frozen=True)
class Decision:
    """Whether to train now, and the reason.

    Attributes:
        train: whether to train.
        reason: the reason as a sentence.
        new_labels: number of new or changed labels.
        from_nothing: whether the run starts from random weights.
        wait_seconds: time after which to decide again, if only time is missing.
    """

    train: bool
    reason: str
    new_labels: int = 0
    from_nothing: bool = False
    wait_seconds: float | None = None


def decide(history: History) -> Decision:
    """Decide whether to train now. This is a pure function of the history."""
    settings, new = history.settings, history.new
    count = len(new)
    if settings.retrain == "off":
        return Decision(False, "retraining is off; it trains when somebody presses Train", count)
    if history.running:
        return Decision(False, "a training runs; labels that come in meanwhile are for the next one", count)
    if history.waits_for_room:
        return Decision(False, "the disk was full, and a training waits until it has room to go on", count)
    if not new:
        since = f"since {history.last_version}" if history.last_version else "yet"
        return Decision(False, f"no label is new {since}", 0)
    if len(history.labels) < MIN_CASES_FOR_VALIDATION and history.serving:
        return Decision(
            False,
            f"{len(history.labels)} labels: with fewer than {MIN_CASES_FOR_VALIDATION} nothing is held out to judge a "
            "training, and what is served is not replaced without a comparison",
            count,
        )
    cause, why_not, wait = _scheduled(history) if settings.retrain == "schedule" else _due(history)
    if not cause:
        return Decision(False, why_not, count, wait_seconds=wait)
    return _after_waiting(history, cause, count)


def _after_waiting(history: History, cause: str, count: int) -> Decision:
    """With a cause for training: decide whether the time has come."""
    backoff = min(SECONDS_AFTER_FAILURE * 2 ** (history.failures - 1), LONGEST_AFTER_FAILURE)
    left = history.failed_at + backoff - history.now if history.failures else 0.0
    if left > 0:
        words = f"{cause}; {history.failures} runs have failed, and the next is tried in {left:.0f} s"
        return Decision(False, words, count, wait_seconds=left)
    quiet = history.settings.retrain_quiet_seconds
    left = max(label.saved_at for label in history.new.values()) + quiet - history.now
    if left > 0:
        return Decision(False, f"{cause}; waits until no label has come in for {quiet:g} s", count, wait_seconds=left)
    every = history.settings.retrain_from_nothing
    from_nothing = every > 0 and (history.runs + 1) % every == 0
    start = f"; from nothing, as every {_ordinal(every)} run" if from_nothing else ""
    return Decision(True, cause + start, count, from_nothing)


def _due(history: History) -> tuple[str, str, float | None]:
    """The reason to train if there are enough new labels; otherwise the reason not to."""
    settings, count = history.settings, len(history.new)
    if count >= settings.retrain_after:
        return f"{count} labels are new or changed, and {settings.retrain_after} are enough", "", None
    dice = history.dice_on_new
    if dice is not None and dice < settings.retrain_floor:
        words = (
            f"the served model has a mean Dice of {dice:.3f} on {count} new labels, below {settings.retrain_floor:g}"
        )
        return words, "", None
    return "", f"{count} labels are new or changed; waits for {settings.retrain_after}", None


def _scheduled(history: History) -> tuple[str, str, float | None]:
    """The reason to train if the scheduled time has passed since the last run and the oldest new label."""
    hour, minute = map(int, history.settings.retrain_at.split(":"))
    zone = datetime.timezone(datetime.timedelta(seconds=history.utc_offset_seconds))
    now = datetime.datetime.fromtimestamp(history.now, zone)
    today = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    last = today if today <= now else today - datetime.timedelta(days=1)
    since = max(history.last_run_at, min(label.saved_at for label in history.new.values()))
    count, at = len(history.new), history.settings.retrain_at
    if last.timestamp() >= since:
        return f"it is after {at}, and {count} labels are new or changed", "", None
    left = (last + datetime.timedelta(days=1) - now).total_seconds()
    return "", f"{count} labels are new or changed; the next run is at {at}", left


def _ordinal(number: int) -> str:
    return {1: "", 2: "second", 3: "third"}.get(number, f"{number}th")
