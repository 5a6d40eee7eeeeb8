"""The lanes of this process: each device has its own weights and lock, and runs one computation at a time.

Two concurrent computations on one device are slower than sequential ones and need twice the memory, so a lane is
usually a whole device; ``cpu,cpu`` makes two lanes that share the cores. ``lib.infers.devices.schedule`` decides which
lane computes what. This module has the locks, the waiting threads and the handling of failed devices.
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
"""Number of devices that one piece of work may break; an image that breaks devices must not disable all of them."""
SECONDS_BETWEEN_LOOKS = 0.5


class Lanes:
    """Assigns lanes to work.

    Args:
        lanes: the pool of lanes for work that names no device.
        try_again: tests a failed device; raises while it does not work.
        retry_seconds: delay before the first test of a failed device, doubled after each further failure.
        clock: monotonic clock in seconds.
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
        """The lanes for a setting that :func:`parse_devices` accepts."""
        return cls(parse_devices(devices))

    def __iter__(self) -> Iterator[Lane]:
        with self._lock:
            return iter(list(self._lanes.values()))

    @property
    def first(self) -> Lane:
        """The first working lane of the pool; the first lane if none works."""
        with self._lock:
            pooled = [lane for lane in self._lanes.values() if lane.pooled]
            return next((lane for lane in pooled if self._schedule.lanes[lane.name].failure is None), pooled[0])

    def state(self, lane: Lane) -> LaneState:
        """The state of a lane."""
        return self._schedule.lanes[lane.name]

    def seconds_until_retry(self, lane: Lane) -> float:
        """Seconds until a failed lane is tested again; 0 for a working one."""
        failure = self.state(lane).failure
        return 0.0 if failure is None else max(0.0, failure.until - self._clock())

    def problems(self) -> list[str]:
        """A sentence for each failed lane."""
        return [
            f"device {lane.name} failed ({state.failure.reason}); it is tried again in "
            f"{self.seconds_until_retry(lane):.0f} s"
            for lane in self
            if (state := self.state(lane)).failure is not None
        ]

    @property
    def several(self) -> bool:
        """Whether work that names no device can run on more than one lane."""
        with self._lock:
            return sum(lane.pooled for lane in self._lanes.values()) > 1

    @property
    def any_works(self) -> bool:
        """Whether a lane of the pool works."""
        return self.state(self.first).failure is None

    def watch(self, watcher: Callable[[frozenset[str]], None]) -> None:
        """Register a callback for changes of the set of devices that foreground work uses or waits for."""
        self._watchers.append(watcher)

    def occupy(self, devices: frozenset[str]) -> None:
        """Set the devices that training and scoring processes use; other devices are preferred."""
        with self._lock:
            for lane in self._lanes.values():
                self.state(lane).occupied = str(lane.device) in devices

    def quietest(self, kind: str) -> torch.device:
        """The least busy device of the pool, for work in a separate process; the last one of several equals.

        Args:
            kind: ``cuda`` or ``cpu``; without such a device, the device of the first lane is returned.
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
        """A work item for :meth:`enter`; a named device that is not in the pool gets a lane of its own.

        Args:
            device: None for any device of the pool.
            what, weights, seconds, ahead: see :class:`Work`.
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
        """Put work into the queue for a device; it must be followed by :meth:`leave` in any case.

        Returns:
            A future of the lane, which is done when the lane is free for this work.

        Raises:
            DeviceError: if no suitable lane works; the future may raise it too.
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
        """Report that work has ended or no longer waits.

        Args:
            work: the work item.
            finished: whether it was completed.
        """
        with self._lock:
            self._granted.pop(work, None)
            self._schedule.end(work, self._clock(), finished)
            for name in work.lacked_memory if finished else ():
                # another lane could do it, so the work was not the cause
                if self._schedule.lanes[name].failure is None:
                    self._fall_out(name, "memory ran out, however little was done at once")
            self._step()

    def retry_elsewhere(self, work: Work, error: Exception) -> Future[Lane] | None:
        """Decide whether work that ended with an error is repeated on another lane.

        Returns:
            A future of another lane; None if the error belongs to the work itself and has to be reported.

        Raises:
            DeviceError: if the device failed and no other device may do the work.
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
                work.tried.clear()  # it fits on no lane
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
        """Compute on the lane of this thread, or otherwise on the lane that is expected to finish first.

        Raises:
            DeviceError: if no device works.
        """
        lane = lane_in_use()
        if lane is not None:  # the caller that assigned the lane handles its failures
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
                    elsewhere = self.retry_elsewhere(work, error)
                    if elsewhere is None:
                        raise
                granted = elsewhere  # outside of the except clause, since the error keeps references to the failed work
        finally:
            self.leave(work, finished)

    def foreground_count(self, device: torch.device | None) -> int:
        """Number of work items with a waiting client that run or wait on the lanes of a device."""
        names = {lane.name for lane in self if lane.serves(device)}
        with self._lock:
            return sum(bool(names & set(work.lanes)) for work in self._schedule.foreground())

    def waiting(self) -> int:
        """Number of foreground work items that have no lane yet."""
        with self._lock:
            return sum(not work.lane for work in self._schedule.foreground())

    def is_idle(self, device: str) -> bool:
        """Whether no foreground work runs or waits on a device."""
        with self._lock:
            return device not in self._in_use

    def seconds_until_free(self, device: torch.device | None) -> float:
        """Expected seconds until the work that runs and waits on the lanes of a device is done."""
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
        self._notify_watchers()
        self._schedule_check()

    def _notify_watchers(self) -> None:
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
        """The error for work if no lane works."""
        failures = {name: self._schedule.lanes[name].failure for name in work.lanes}
        reasons = ", ".join(f"{name} ({failure.reason})" for name, failure in failures.items() if failure is not None)
        waits = [self.seconds_until_retry(self._lanes[name]) for name in work.lanes]
        text = (
            f"no device works: {reasons}"
            if all(failures.values())
            else f"{reasons} failed on it, and no other is tried"
        )
        return DeviceError(text, max(1, round(min(waits))))

    def _schedule_check(self) -> None:
        """Schedule another check, while work waits next to an idle lane or a lane has failed."""
        lanes = self._schedule.lanes.values()
        out = any(lane.failure is not None for lane in lanes)
        idle = any(lane.work is None for lane in lanes)
        if self._looking or not (out or (idle and any(not work.ahead for work in self._schedule.waiting()))):
            return
        self._looking = True
        timer = threading.Timer(min(SECONDS_BETWEEN_LOOKS, self._retry_seconds), self._check_failed)
        timer.daemon = True
        timer.start()

    def _check_failed(self) -> None:
        with self._lock:
            due = [self._lanes[name] for name in self._schedule.due(self._clock())]
        # outside of the lock, so that a hanging device does not block other threads
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
