"""Trials of served weights: remembered, taken up again after an interruption, and given up after five."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from lib.cases.labelled import Case
from lib.infers.interruption import InterruptedWork
from lib.server.work.trials import MOST_INTERRUPTIONS, Trial, Trials

CASE = Case("a", Path("a.nii.gz"), Path("label.nii.gz"))
FIRST, CHANGED = Trial("m", "v0001", "a", "digest"), Trial("m", "v0001", "a", "another digest")


class Device:
    """Interrupts so many trials, after they have begun or before; then gives a Dice."""

    def __init__(self, interruptions: int, begins: bool = True) -> None:
        self.left, self.begins, self.computed = interruptions, begins, 0

    def __call__(self, model: str, case: Case, begin: Callable[[], None]) -> float:
        if self.left and not self.begins:
            self.left -= 1
            raise InterruptedWork
        begin()
        self.computed += 1
        if self.left:
            self.left -= 1
            raise InterruptedWork
        return 0.75


def test_trial_that_is_interrupted_is_taken_up_again_and_then_remembered() -> None:
    device = Device(MOST_INTERRUPTIONS - 1)
    trials = Trials(device)
    said = [trials.run(FIRST, CASE) for _ in range(MOST_INTERRUPTIONS + 3)]
    assert said == [False] * (MOST_INTERRUPTIONS - 1) + [True] * 4
    assert (trials.known(FIRST), device.computed) == (0.75, MOST_INTERRUPTIONS)


def test_trial_that_is_interrupted_again_and_again_is_given_up() -> None:
    device = Device(1000)
    trials = Trials(device)
    for _ in range(50):
        trials.run(FIRST, CASE)
    assert device.computed == MOST_INTERRUPTIONS
    assert math.isnan(trials.known(FIRST))
    trials.run(CHANGED, CASE)
    assert device.computed == MOST_INTERRUPTIONS + 1, "a label that has changed is another trial"


def test_waiting_for_the_device_gives_nothing_up() -> None:
    device = Device(100, begins=False)
    trials = Trials(device)
    for _ in range(101):
        trials.run(FIRST, CASE)
    assert (trials.known(FIRST), device.computed) == (0.75, 1)
