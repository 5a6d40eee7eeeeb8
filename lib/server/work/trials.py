"""Trials of the live weights on new labels, which can be interrupted, and are given up after several attempts."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lib.cases.labelled import Case
from lib.infers.interruption import InterruptedWork

logger = logging.getLogger("unetr.retrain")

MOST_INTERRUPTIONS = 5
"""Number of interrupted trials of one label after which it is given up, since each wastes computing time."""


@dataclass(frozen=True)
class Trial:
    """A trial: the version of the weights, and the content of a case's label."""

    model: str
    version: str
    case_id: str
    digest: str


class Trials:
    """Stores each trial's Dice, and how often it was interrupted.

    Args:
        try_on: a model's mean Dice on a case, NaN if it cannot be computed; it calls its last argument when the
            computation starts, and raises :class:`InterruptedWork` if foreground work uses the device.
    """

    def __init__(self, try_on: Callable[[str, Case, Callable[[], None]], float]) -> None:
        self._try_on = try_on
        self._dice: dict[Trial, float] = {}
        self._begun: Counter[Trial] = Counter()

    def known(self, trial: Trial) -> float:
        """The Dice; NaN if it was not computed, cannot be computed, or was given up."""
        return self._dice.get(trial, math.nan)

    def run(self, trial: Trial, case: Case) -> bool:
        """Run a trial, unless it was done already or given up.

        Returns:
            False if foreground work uses the device, so that no other trial should start now.
        """
        if trial in self._dice:
            return True
        try:
            self._dice[trial] = self._try_on(trial.model, case, lambda: self._begun.update([trial]))
        except InterruptedWork:
            if self._begun[trial] >= MOST_INTERRUPTIONS:
                self._dice[trial] = math.nan
                logger.info(
                    "%s is not tried on %s any more: requests interrupted it %d times; how many labels are new decides",
                    trial.model,
                    trial.case_id,
                    self._begun[trial],
                )
            return False
        return True
