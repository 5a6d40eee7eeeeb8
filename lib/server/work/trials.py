"""Trials of the served weights on new labels, each of which others may interrupt, and which are given up in the end."""

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
"""Trials of one label that are begun and interrupted before it is given up: each costs what it had computed by then."""


@dataclass(frozen=True)
class Trial:
    """What is tried: the weights of a version on one content of a case's label."""

    model: str
    version: str
    case_id: str
    digest: str


class Trials:
    """Remembers each trial's Dice, and how often it was interrupted.

    Args:
        try_on: a model's mean Dice on a case, NaN where it cannot be computed; calls its last argument when it begins
            to compute, and raises :class:`InterruptedWork` where somebody else uses the device.
    """

    def __init__(self, try_on: Callable[[str, Case, Callable[[], None]], float]) -> None:
        self._try_on = try_on
        self._dice: dict[Trial, float] = {}
        self._begun: Counter[Trial] = Counter()

    def known(self, trial: Trial) -> float:
        """The Dice, NaN where it has not been tried, cannot be, or was given up."""
        return self._dice.get(trial, math.nan)

    def run(self, trial: Trial, case: Case) -> bool:
        """Try a case, unless it has been tried already or was given up.

        Returns:
            False where somebody else uses the device, so that nothing else should be tried now.
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
