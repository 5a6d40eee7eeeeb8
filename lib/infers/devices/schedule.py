"""Chooses for each piece of work the lane that is expected to finish it first. The module is pure state and arithmetic.

A lane is a device with its own weights, or a share of one. Foreground work, for which a client waits, is considered in
order of arrival, and each item reserves its lane before the next one is considered, so that no item is overtaken on its
lane. Background work takes lanes without foreground work, and yields when foreground work arrives.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

FIRST_SECONDS = 1.0
"""Assumed duration of work that was never measured."""
LOADING_SECONDS = 3.0
"""Assumed duration of loading weights that were never loaded."""
YIELDING_SECONDS = 0.5
"""Assumed time until background work or a training on the same device has yielded."""
REMEMBERED = 9
RETRY_SECONDS = 30.0
LONGEST_RETRY_SECONDS = 600.0

Weights = tuple[str, Hashable]
"""Name of a model, and a value that changes with its weights."""


@dataclass(frozen=True)
class Forecast:
    """The needs of a request: its weights, and its expected seconds by measured costs; None if nothing was measured."""

    weights: Weights | None = None
    seconds: float | None = None


@dataclass(eq=False)
class Work:
    """A work item that one lane computes alone.

    Attributes:
        lanes: names of the lanes that may do it.
        what: identity of the result; two items with the same identity never run at the same time, since the second one
            will find the result of the first in the cache.
        weights: weights that have to be loaded.
        seconds: expected duration by measured costs; None if unknown.
        ahead: whether it is background work, for which no client waits.
        tried: lanes that failed on it.
        lacked_memory: the lanes among them that had too little memory.
        lane: the lane that does it; empty while it waits.
        since: when the lane began.
        loads: whether the weights are loaded first.
        ends: whether it has to yield now.
    """

    lanes: tuple[str, ...]
    what: Hashable = None
    weights: Weights | None = None
    seconds: float | None = None
    ahead: bool = False
    tried: set[str] = field(default_factory=set)
    lacked_memory: set[str] = field(default_factory=set)
    lane: str = ""
    since: float = 0.0
    loads: bool = False
    ends: bool = False
    place: int = -1


@dataclass(frozen=True)
class Failure:
    """Why a lane failed, when it is tested again, and the number of failures in a row."""

    reason: str
    until: float
    count: int


@dataclass
class _Experience:
    """Recent durations of work relative to the expectation, in seconds, and of loading weights."""

    paces: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    loading: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))


@dataclass
class LaneState:
    """The state of a lane.

    Attributes:
        work: the item that it computes.
        weights: loaded weights, by name of the model.
        failure: set while the lane is out of use.
        failures: number of failures.
        done: number of finished items.
        waiting: number of items reserved for it.
        occupied: whether a training or scoring process uses the same device.
    """

    name: str
    work: Work | None = None
    weights: dict[str, Hashable] = field(default_factory=dict)
    failure: Failure | None = None
    failures: int = 0
    in_a_row: int = 0
    done: int = 0
    waiting: int = 0
    occupied: bool = False
    own: _Experience = field(default_factory=_Experience)
    of_all: _Experience = field(default_factory=_Experience)

    def has_loaded(self, weights: Weights | None) -> bool:
        """Whether the weights of the work are loaded."""
        return weights is None or (weights[0] in self.weights and self.weights[weights[0]] == weights[1])

    def computing_seconds(self, work: Work) -> float:
        """Expected duration of the work with loaded weights, corrected by the past error of expectations on this lane.

        A lane without finished work is assumed to be like the others.
        """
        if work.seconds is not None:
            return work.seconds * median(self.own.paces or self.of_all.paces or [1.0])
        return median(self.own.durations or self.of_all.durations or [FIRST_SECONDS])

    def loading_seconds(self) -> float:
        """Expected duration of loading weights on this lane."""
        return median(self.own.loading or self.of_all.loading or [LOADING_SECONDS])

    def free_at(self, now: float) -> float:
        """Expected time at which the lane is free; overdue work gets another quarter of its elapsed time."""
        if self.work is None:
            return now + YIELDING_SECONDS * self.occupied
        if self.work.ahead:
            return now + YIELDING_SECONDS
        whole = self.computing_seconds(self.work) + self.loading_seconds() * self.work.loads
        elapsed = now - self.work.since
        return now + max(whole - elapsed, elapsed / 4)


class Schedule:
    """The lanes, their current work, and the waiting work. Callers must serialise the calls.

    Args:
        lanes: names of the lanes; among lanes that would finish at the same time, the first one is chosen.
    """

    def __init__(self, lanes: Collection[str]) -> None:
        self._of_all = _Experience()
        self._lanes = {name: LaneState(name, of_all=self._of_all) for name in lanes}
        self._waiting: list[Work] = []
        self._count = 0

    @property
    def lanes(self) -> Mapping[str, LaneState]:
        """The state of each lane."""
        return self._lanes

    def add_lane(self, name: str) -> None:
        """Add a lane, unless it exists."""
        self._lanes.setdefault(name, LaneState(name, of_all=self._of_all))

    def foreground(self) -> list[Work]:
        """Foreground work: running items first, then waiting ones."""
        doing = [lane.work for lane in self._lanes.values() if lane.work is not None]
        return [work for work in (*doing, *self._waiting) if not work.ahead]

    def waiting(self) -> list[Work]:
        """Work without a lane, including background work, in order of arrival."""
        return list(self._waiting)

    def working(self, work: Work) -> list[LaneState]:
        """Lanes that may do the work, without those that are out of use or failed on it."""
        lanes = [self._lanes[name] for name in work.lanes]
        return [lane for lane in lanes if lane.failure is None and lane.name not in work.tried]

    def add(self, work: Work) -> None:
        """Add waiting work; work that returns from a lane takes its former place in the order."""
        if work.place < 0:
            work.place, self._count = self._count, self._count + 1
        work.lane, work.ends = "", False
        self._waiting.append(work)
        self._waiting.sort(key=lambda one: one.place)

    def end(self, work: Work, now: float, finished: bool = True) -> None:
        """Remove work that has ended or is cancelled.

        Args:
            work: the item, which may still be waiting.
            now: the current time.
            finished: whether it was completed, so that its duration is informative.
        """
        if not work.lane:
            if work in self._waiting:
                self._waiting.remove(work)
            return
        lane = self._lanes[work.lane]
        work.lane, lane.work = "", None
        if not finished:
            if work.loads and work.weights is not None:
                lane.weights.pop(work.weights[0], None)  # the weights may not have been loaded
            return
        lane.done, lane.in_a_row = lane.done + 1, 0
        self._learn(lane, work, now - work.since)

    def step(self, now: float) -> list[Work]:
        """Assign free lanes; returns the work that starts now, with ``lane`` set.

        Background work on a lane that foreground work needs has ``ends`` set afterwards.
        """
        begun: list[Work] = []
        free = {name: lane.free_at(now) for name, lane in self._lanes.items()}
        coming: dict[str, list[Work]] = {name: [] for name in self._lanes}
        for work in [work for work in self._waiting if not work.ahead]:
            lane = self._first_to_finish(work, free, coming)
            if lane is None:
                continue
            free[lane.name] += self._seconds_on(lane, work, coming[lane.name])
            if lane.work is None and not coming[lane.name]:
                begun.append(self._begin(lane, work, now))
                continue
            coming[lane.name].append(work)
            if lane.work is not None and lane.work.ahead and (work.what is None or lane.work.what != work.what):
                lane.work.ends = True
        for work in [work for work in self._waiting if work.ahead]:
            idle = [lane for lane in self.working(work) if lane.work is None and not coming[lane.name]]
            if idle:
                best = min(idle, key=lambda lane: (lane.occupied, not lane.has_loaded(work.weights)))
                begun.append(self._begin(best, work, now))
        for name, lane in self._lanes.items():
            lane.waiting = len(coming[name])
        return begun

    def seconds_until_free(self, lanes: Collection[str], now: float) -> float:
        """Expected seconds until all running and waiting work of these lanes is done, if shared evenly."""
        chosen = [self._lanes[name] for name in lanes if self._lanes[name].failure is None]
        if not chosen:
            return math.inf
        left = sum(max(0.0, lane.free_at(now) - now) for lane in chosen if lane.work is not None)
        own = {lane.name for lane in chosen}
        left += sum(
            chosen[0].computing_seconds(work) for work in self._waiting if not work.ahead and own & {*work.lanes}
        )
        return left / len(chosen)

    def fail(self, name: str, reason: str, now: float, retry_seconds: float = RETRY_SECONDS) -> None:
        """Take a lane out of use, twice as long after each failure in a row; its loaded weights are discarded."""
        lane = self._lanes[name]
        lane.failures += 1
        self.postpone(name, reason, now, retry_seconds)
        lane.weights.clear()

    def postpone(self, name: str, reason: str, now: float, retry_seconds: float = RETRY_SECONDS) -> None:
        """Keep a lane that failed its test out of use."""
        lane = self._lanes[name]
        lane.in_a_row += 1
        delay = min(retry_seconds * 2 ** (lane.in_a_row - 1), max(retry_seconds, LONGEST_RETRY_SECONDS))
        lane.failure = Failure(reason, now + delay, lane.in_a_row)

    def due(self, now: float) -> list[str]:
        """Lanes that are out of use and have to be tested now."""
        return [lane.name for lane in self._lanes.values() if lane.failure is not None and lane.failure.until <= now]

    def restore(self, name: str) -> None:
        """Put a lane back into use."""
        self._lanes[name].failure = None

    def _first_to_finish(
        self, work: Work, free: Mapping[str, float], coming: Mapping[str, list[Work]]
    ) -> LaneState | None:
        lanes = self.working(work)
        if work.what is not None:
            same = [lane for lane in lanes if any(one.what == work.what for one in self._on(lane, coming))]
            lanes = same[:1] or lanes
        if not lanes:
            return None
        return min(lanes, key=lambda lane: free[lane.name] + self._seconds_on(lane, work, coming[lane.name]))

    @staticmethod
    def _on(lane: LaneState, coming: Mapping[str, list[Work]]) -> Iterator[Work]:
        if lane.work is not None:
            yield lane.work
        yield from coming[lane.name]

    @staticmethod
    def _seconds_on(lane: LaneState, work: Work, before: Collection[Work]) -> float:
        loaded = lane.has_loaded(work.weights) or any(one.weights == work.weights for one in before)
        return lane.computing_seconds(work) + lane.loading_seconds() * (not loaded)

    def _begin(self, lane: LaneState, work: Work, now: float) -> Work:
        self._waiting.remove(work)
        work.lane, work.since, work.ends, work.loads = lane.name, now, False, not lane.has_loaded(work.weights)
        lane.work = work
        if work.weights is not None:
            lane.weights[work.weights[0]] = work.weights[1]  # the next item finds them loaded
        return work

    @staticmethod
    def _learn(lane: LaneState, work: Work, seconds: float) -> None:
        beside_computing = max(0.0, seconds - lane.computing_seconds(work))
        for known in (lane.own, lane.of_all):
            if work.loads:
                known.loading.append(beside_computing)
                continue
            known.durations.append(seconds)
            if work.seconds:
                known.paces.append(seconds / work.seconds)
