"""Times on disk never lie in the future, whatever was done to the clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.configs.retraining import Retraining
from lib.storage.clock import PastTimes
from lib.trainers.retrain import History, Label, decide

DAY = 86_400.0


class Clocks:
    """Two clocks: ``now`` may be turned back."""

    def __init__(self) -> None:
        self.now, self.monotonic = 1_000_000.0, 50.0

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.monotonic += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def times(clocks: Clocks) -> PastTimes:
    return PastTimes(lambda: clocks.now, lambda: clocks.monotonic)


def test_time_of_the_past_is_what_it_is(times: PastTimes, clocks: Clocks) -> None:
    assert times.of("a", clocks.now - 100) == clocks.now - 100
    clocks.wait(5)
    assert times.of("a", clocks.now - 105) == clocks.now - 105


@pytest.mark.parametrize("jump", [DAY, 3 * DAY, 400 * DAY])
def test_time_that_lies_in_the_future_grows_older_by_the_monotonic_clock(
    times: PastTimes, clocks: Clocks, jump: float
) -> None:
    written = clocks.now
    assert times.of("a", written) == written
    clocks.wait(10)
    clocks.now -= jump
    assert times.of("a", written) == pytest.approx(clocks.now - 10)
    clocks.wait(20)
    assert times.of("a", written) == pytest.approx(clocks.now - 30)
    assert times.of("a", written + 1) == pytest.approx(clocks.now), "written again: another event"


@pytest.mark.parametrize("jump", [DAY, 3 * DAY])
def test_policy_waits_for_quiet_as_long_as_ever_after_the_clock_was_turned_back(
    times: PastTimes, clocks: Clocks, jump: float
) -> None:
    """It waited 86,360 s."""
    saved = {f"case_{n}": clocks.now for n in range(6)}

    def history() -> History:
        labels = {name: Label("x", times.of(name, at)) for name, at in saved.items()}
        return History(Retraining(retrain_quiet_seconds=60), clocks.now, labels, serving=True)

    assert decide(history()).wait_seconds == pytest.approx(60)
    clocks.wait(20)
    clocks.now -= jump
    assert decide(history()).wait_seconds == pytest.approx(40)
    clocks.wait(41)
    assert decide(history()).train
    assert decide(replace(history(), failures=1, failed_at=times.of("f", clocks.now + jump))).wait_seconds == 600
