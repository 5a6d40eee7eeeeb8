"""The state of a training run, and when it is stored on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from lib.cases.metrics import mean_known
from lib.networks.layouts import StateDict
from lib.trainers.resume import fingerprint, read_state, write_state
from lib.trainers.run.job import TrainingJob, Validation

# The base network's state takes 1.5 GB: storing it may take at most a twentieth of a run's time.
STATE_PAUSE_FACTOR = 20
# Fields of RunState that are stored unchanged.
COUNTS = ("step", "epoch", "step_of_epoch", "bad_steps", "losses", "epochs_since_best", "done")


class Stateful(Protocol):
    """A network, optimiser, schedule or scaler of PyTorch."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class BestWeights(NamedTuple):
    """The averaged weights of the epoch with the highest mean Dice."""

    mean: float
    epoch: int
    dice: dict[str, float]
    weights: StateDict


@dataclass
class RunState:
    """Counters and results of a run.

    Attributes:
        step: optimisation steps taken.
        epoch: the current epoch, from 1.
        step_of_epoch: number of steps in the current epoch.
        bad_steps: number of consecutive steps whose gradients were not finite.
        losses: the loss of each step.
        validations: Dice after each validated epoch.
        best: best weights so far; None before the first validation.
        epochs_since_best: epochs since the mean Dice last improved.
        done: whether the run has ended.
    """

    step: int = 0
    epoch: int = 1
    step_of_epoch: int = 0
    bad_steps: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    best: BestWeights | None = None
    epochs_since_best: int = 0
    done: bool = False

    def keep_if_best(self, dice: dict[str, float], weights: Callable[[], StateDict]) -> BestWeights | None:
        """Store and return the weights of this epoch if its mean Dice is the highest so far; otherwise None.

        Args:
            dice: Dice of each label in this epoch.
            weights: returns a copy of the weights; called only for the best epoch.
        """
        mean = mean_known(dice.values())
        if self.best is not None and not mean > self.best.mean and not math.isnan(self.best.mean):
            return None
        self.epochs_since_best = 0
        self.best = BestWeights(mean, self.epoch, dice, weights())
        return self.best


class StateKeeper:
    """Stores the state of a run at intervals, and restores it.

    Args:
        job: the run.
        state: its counters, which are restored too.
        stateful: the network and everything else that changes with each step, by name.
        writes: false for all processes except rank 0.
    """

    def __init__(self, job: TrainingJob, state: RunState, stateful: Mapping[str, Stateful], writes: bool) -> None:
        self._job, self._state, self._stateful, self._writes = job, state, stateful, writes
        self._seconds_before = 0.0
        self.restored = False
        if job.resume:
            self._restore()
        self._started = self._written = time.monotonic()
        self._pause = job.state_seconds
        self._steps_before = state.step

    @property
    def seconds(self) -> float:
        """Duration of the run, over all its starts."""
        return self._seconds_before + time.monotonic() - self._started

    def seconds_for(self, steps: int) -> float:
        """Expected duration of a number of further steps, from those since this start; infinite before the first."""
        taken = self._state.step - self._steps_before
        return (time.monotonic() - self._started) / taken * steps if taken else math.inf

    def is_due(self) -> bool:
        """Whether the interval since the last stored state has passed."""
        return self._writes and time.monotonic() - self._written >= self._pause

    def write(self) -> None:
        """Store everything on which the rest of the run depends."""
        if not self._writes:
            return
        state = self._state
        moving = {name: part.state_dict() for name, part in self._stateful.items()}
        counts = {name: getattr(state, name) for name in COUNTS}
        validations = [(validation.step, validation.dice) for validation in state.validations]
        best = None if state.best is None else tuple(state.best)
        plain = {"best": best, "validations": validations, "seconds": self.seconds}
        start = time.monotonic()
        write_state(self._job.run_dir, {"fingerprint": self._fingerprint} | moving | counts | plain)
        self._written = time.monotonic()
        if self._job.state_seconds:
            self._pause = max(self._job.state_seconds, STATE_PAUSE_FACTOR * (self._written - start))

    def _restore(self) -> None:
        """Restore the stored state."""
        saved = read_state(self._job.run_dir, self._fingerprint)
        if saved is None:
            return
        for name, part in self._stateful.items():
            part.load_state_dict(saved[name])
        for name in COUNTS:
            setattr(self._state, name, saved[name])
        self._state.best = None if saved["best"] is None else BestWeights(*saved["best"])
        self._state.validations = [Validation(step, dice) for step, dice in saved["validations"]]
        self._seconds_before = saved["seconds"]
        self.restored = True

    @property
    def _fingerprint(self) -> str:
        job = self._job
        train, held_out = ([case.case_id for case in cases] for cases in (job.train_cases, job.validation_cases))
        return fingerprint(job.preset, train, held_out, job.max_steps)
