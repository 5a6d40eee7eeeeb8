"""The devices of this process as lanes: each with its own weights and its own lock, one computation at a time on each.

Two computations on one device are slower than one after the other and need twice the memory, so a lane is a device;
``cpu,cpu`` are two lanes that share the cores. ``lib.infers.devices.schedule`` says who computes where; here are the
locks, the threads that wait, and what becomes of a device that fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from lib.errors import DeviceError
from lib.infers.devices.failures import first_line, is_device_error, lacks_memory, try_device
from lib.infers.devices.lane import Lane, computing_on, lane_in_use, parse_devices
from lib.infers.devices.schedule import RETRY_SECONDS, LaneState, Schedule, Weights, Work

logger = logging.getLogger("unetr.devices")

Result = TypeVar("Result")

MOST_BROKEN = 2
"""Devices that may fail on one piece of work: if it is the image that breaks them, it must not take all of them."""
SECONDS_BETWEEN_LOOKS = 0.5


class Lanes:
    """Gives lanes to whoever computes.

    Args:
        lanes: the devices that work without a wish goes to.
        try_again: computes something on a device that had failed; raises while it does not work.
        retry_seconds: after how long a device that failed is tried again, doubled each time in a row.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        try_again: Callable[[torch.device], None] = try_device,
        retry_seconds: float = RETRY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lanes = {lane.name: lane for lane in lanes}
        self._schedule = Schedule(list(self._lanes))
        self._try_again, self._retry_seconds, self._clock = try_again, retry_seconds, clock
        self._granted: dict[Work, Future[Lane]] = {}
        self._lock = threading.RLock()
        self._watchers: list[Callable[[frozenset[str]], None]] = []
        self._in_use: frozenset[str] = frozenset()
        self._looking = False

    @classmethod
    def of(cls, devices: str) -> Lanes:
        """As :func:`parse_devices` reads them."""
        return cls(parse_devices(devices))

    def __iter__(self) -> Iterator[Lane]:
        with self._lock:
            return iter(list(self._lanes.values()))

    @property
    def first(self) -> Lane:
        """The first lane of the pool that works; the very first where none does."""
        with self._lock:
            pooled = [lane for lane in self._lanes.values() if lane.pooled]
            return next((lane for lane in pooled if self._schedule.lanes[lane.name].failure is None), pooled[0])

    def state(self, lane: Lane) -> LaneState:
        """What is known of a lane."""
        return self._schedule.lanes[lane.name]

    def seconds_until_retry(self, lane: Lane) -> float:
        """After how long a lane that is out is tried again; 0 for one that works."""
        failure = self.state(lane).failure
        return 0.0 if failure is None else max(0.0, failure.until - self._clock())

    def problems(self) -> list[str]:
        """A sentence for each lane that is out."""
        return [
            f"device {lane.name} failed ({state.failure.reason}); it is tried again in "
            f"{self.seconds_until_retry(lane):.0f} s"
            for lane in self
            if (state := self.state(lane)).failure is not None
        ]

    @property
    def several(self) -> bool:
        """Whether there is a choice for work without a wish."""
        with self._lock:
            return sum(lane.pooled for lane in self._lanes.values()) > 1

    @property
    def any_works(self) -> bool:
        """Whether there is a lane for work without a wish."""
        return self.state(self.first).failure is None

    def watch(self, watcher: Callable[[frozenset[str]], None]) -> None:
        """Have a function called with the devices that somebody computes on or waits for, whenever they change."""
        self._watchers.append(watcher)

    def occupy(self, devices: frozenset[str]) -> None:
        """Say on which devices trainings and scorings compute: others are taken first."""
        with self._lock:
            for lane in self._lanes.values():
                self.state(lane).occupied = str(lane.device) in devices

    def quietest(self, kind: str) -> torch.device:
        """The device of the pool with the least to do, for work in a process of its own: the last of several.

        Args:
            kind: ``cuda`` or ``cpu``; the first lane's device where there is none of it.
        """
        with self._lock:
            lanes = [lane for lane in self._lanes.values() if lane.pooled and lane.device.type == kind]
            states = [(lane, self.state(lane)) for lane in reversed(lanes)]
            able = [(lane, state) for lane, state in states if state.failure is None]
            if not able:
                return self.first.device
            return min(able, key=lambda one: (one[1].occupied, one[1].work is not None, one[1].waiting))[0].device

    def work(
        self,
        device: torch.device | None,
        what: Hashable = None,
        weights: Weights | None = None,
        seconds: float | None = None,
        ahead: bool = False,
    ) -> Work:
        """A piece of work for :meth:`enter`; a device that is named and not in the pool gets a lane of its own.

        Args:
            device: None: any of the pool.
            what, weights, seconds, ahead: as of :class:`Work`.
        """
        with self._lock:
            names = tuple(lane.name for lane in self._lanes.values() if lane.serves(device))
            if not names:
                assert device is not None
                self._lanes[str(device)] = Lane(str(device), device, pooled=False)
                self._schedule.add_lane(str(device))
                names = (str(device),)
        return Work(names, what, weights, seconds, ahead)

    def enter(self, work: Work) -> Future[Lane]:
        """Enter work into the queue for a device; :meth:`leave` must follow in any case.

        Returns:
            A future that is done when the device is free for the work.

        Raises:
            DeviceError: when no lane that may do it works; also by way of the result, when that comes to be.
        """
        with self._lock:
            if not self._schedule.working(work):
                raise self._no_device(work)
            granted: Future[Lane] = Future()
            self._granted[work] = granted
            self._schedule.add(work)
            self._step()
            return granted

    def leave(self, work: Work, finished: bool = True) -> None:
        """Work is over, or does not wait any longer.

        Args:
            work: which.
            finished: whether it was done to its end.
        """
        with self._lock:
            self._granted.pop(work, None)
            self._schedule.end(work, self._clock(), finished)
            for name in work.lacked_memory if finished else ():
                # it could be done elsewhere, so it was not its fault
                if self._schedule.lanes[name].failure is None:
                    self._fall_out(name, "memory ran out, however little was done at once")
            self._step()

    def moves_on(self, work: Work, error: Exception) -> Future[Lane] | None:
        """What becomes of work that ended with an error.

        Returns:
            Done when there is another lane for it; None where the error is its own, and stays.

        Raises:
            DeviceError: when the device failed, and no other may do it.
        """
        with self._lock:
            name = work.lane
            if not name:
                return None
            broken = is_device_error(error)
            if broken:
                self._fall_out(name, first_line(error))
            elif not lacks_memory(error) or self._lanes[name].device.type == "cpu":
                return None
            self._schedule.end(work, self._clock(), finished=False)
            work.tried.add(name)
            if not broken:
                work.lacked_memory.add(name)
            elsewhere = bool(self._schedule.working(work)) and not (broken and len(work.tried) >= MOST_BROKEN)
            if not broken and not elsewhere:
                work.tried.clear()  # it fits nowhere
                self._step()
                return None
            if not elsewhere:
                failure = self._no_device(work)
                work.tried.clear()
                self._step()
                raise failure from error
            logger.warning("%s: %s; its work goes on elsewhere", name, first_line(error))
            return self.enter(work)

    def run(self, work: Work, compute: Callable[[Lane], Result]) -> Result:
        """Compute on the lane that this thread has, or else on the one that will have finished first.

        Raises:
            DeviceError: when no device works.
        """
        lane = lane_in_use()
        if lane is not None:  # whoever gave it looks after what fails
            with lane.lock:
                return compute(lane)
        finished = False
        granted = self.enter(work)
        try:
            while True:
                lane = granted.result()
                try:
                    with computing_on(lane), lane.lock:
                        result = compute(lane)
                    finished = True
                    return result
                except Exception as error:
                    elsewhere = self.moves_on(work, error)
                    if elsewhere is None:
                        raise
                granted = elsewhere  # after the clause, since the error holds on to what failed
        finally:
            self.leave(work, finished)

    def wanted(self, device: torch.device | None) -> int:
        """How many pieces of work that somebody waits for run or wait on the lanes of a device."""
        names = {lane.name for lane in self if lane.serves(device)}
        with self._lock:
            return sum(bool(names & set(work.lanes)) for work in self._schedule.wanted())

    def waiting(self) -> int:
        """How many that somebody waits for have no lane yet."""
        with self._lock:
            return sum(not work.lane for work in self._schedule.wanted())

    def is_idle(self, device: str) -> bool:
        """Whether nobody computes or waits on a device; what is done ahead does not count."""
        with self._lock:
            return device not in self._in_use

    def seconds_until_free(self, device: torch.device | None) -> float:
        """After how long what runs and waits on the lanes of a device will be done."""
        with self._lock:
            names = [lane.name for lane in self._lanes.values() if lane.serves(device)]
            return self._schedule.seconds_until_free(names, self._clock())

    def _step(self) -> None:
        for work in self._schedule.step(self._clock()):
            granted = self._granted.get(work)
            if granted is not None and granted.set_running_or_notify_cancel():
                granted.set_result(self._lanes[work.lane])
        hopeless = [work for work in self._schedule.waiting() if not self._schedule.working(work)]
        for work in hopeless:
            self._schedule.end(work, self._clock())
            granted = self._granted.pop(work, None)
            if granted is not None and granted.set_running_or_notify_cancel():
                granted.set_exception(self._no_device(work))
        self._tell()
        self._look_again()

    def _tell(self) -> None:
        states = [(lane, self.state(lane)) for lane in self._lanes.values()]
        in_use = frozenset(
            str(lane.device)
            for lane, state in states
            if state.waiting or (state.work is not None and not state.work.ahead)
        )
        if in_use != self._in_use:
            self._in_use = in_use
            for watcher in self._watchers:
                watcher(in_use)

    def _fall_out(self, name: str, reason: str) -> None:
        logger.error("device %s failed: %s", name, reason)
        self._schedule.fail(name, reason, self._clock(), self._retry_seconds)
        self._lanes[name].generation += 1

    def _no_device(self, work: Work) -> DeviceError:
        """What is said where no lane works."""
        failures = {name: self._schedule.lanes[name].failure for name in work.lanes}
        reasons = ", ".join(f"{name} ({failure.reason})" for name, failure in failures.items() if failure is not None)
        waits = [self.seconds_until_retry(self._lanes[name]) for name in work.lanes]
        text = (
            f"no device works: {reasons}"
            if all(failures.values())
            else f"{reasons} failed on it, and no other is tried"
        )
        return DeviceError(text, max(1, round(min(waits))))

    def _look_again(self) -> None:
        """Look again later, while something waits beside an idle lane, or a lane is out."""
        lanes = self._schedule.lanes.values()
        out = any(lane.failure is not None for lane in lanes)
        idle = any(lane.work is None for lane in lanes)
        if self._looking or not (out or (idle and any(not work.ahead for work in self._schedule.waiting()))):
            return
        self._looking = True
        timer = threading.Timer(min(SECONDS_BETWEEN_LOOKS, self._retry_seconds), self._look)
        timer.daemon = True
        timer.start()

    def _look(self) -> None:
        with self._lock:
            due = [self._lanes[name] for name in self._schedule.due(self._clock())]
        # outside of the lock: a device that hangs holds nobody else up
        tried = {lane.name: self._problem_of(lane) for lane in due}
        with self._lock:
            self._looking = False
            for name, problem in tried.items():
                if problem:
                    self._schedule.postpone(name, problem, self._clock(), self._retry_seconds)
                else:
                    logger.warning("device %s works again", name)
                    self._schedule.restore(name)
            self._step()

    def _problem_of(self, lane: Lane) -> str:
        try:
            self._try_again(lane.device)
        except (RuntimeError, MemoryError) as error:
            return first_line(error)
        return ""
