"""Runs cases on several devices: each device reads its next case while it computes the current one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lib.errors import InputError, UnetrError
from lib.infers.interruption import InterruptedWork, interruptible_by

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Taken = TypeVar("Taken", contravariant=True)
Given = TypeVar("Given", covariant=True)
SECONDS_BETWEEN_CHECKS = 0.2


@dataclass(frozen=True)
class Rest(Generic[Given]):
    """The remaining work on a case after the device is free for the next one.

    Attributes:
        finish: computes the result, in another thread.
    """

    finish: Callable[[], Given]


class Worker(Protocol[Taken, Given]):
    """The model on one device. ``read`` runs in another thread while ``compute`` processes the previous case."""

    def read(self, item: Taken) -> Any:
        """Everything that does not need the device."""

    def compute(self, ready: Any) -> Given | Rest[Given]:
        """The work on the device, from the result of ``read``; returns the result, or the remaining work."""


@dataclass(frozen=True)
class Recipe(Generic[Item, Answer]):
    """How a worker is made.

    Attributes:
        key: identifies the worker: another key, for example of newer weights, requires another worker.
        make: makes a worker for a device; it is pickled for workers in other processes.
    """

    key: str
    make: Callable[[str], Worker[Item, Answer]]


@dataclass(frozen=True)
class Finished(Generic[Item, Answer]):
    """A finished case: its result, or the reason why there is none.

    Attributes:
        refused: whether the case itself is faulty, and not a server or a disk, so that it must not be retried.
    """

    item: Item
    answer: Answer | None = None
    problem: str = ""
    refused: bool = False


class Engine(Protocol):
    """Runs cases on the devices of this machine, or of a Ray cluster."""

    def run(
        self, items: Iterable[Item], recipe: Callable[[], Recipe[Item, Answer]]
    ) -> Iterator[Finished[Item, Answer]]:
        """Run all items; results are returned in the order in which they finish.

        Args:
            items: consumed one by one, on demand.
            recipe: called before each item for the worker that it needs.
        """


class LocalEngine:
    """The devices of this process, with one thread for each.

    A worker that raises one of this project's errors has finished its case without an answer; any other error ends
    the run.

    Args:
        devices: PyTorch's device names; a repeated name gets two workers.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)

    def run(
        self, items: Iterable[Item], recipe: Callable[[], Recipe[Item, Answer]]
    ) -> Iterator[Finished[Item, Answer]]:
        """See :class:`Engine`; an abandoned run ends before the next window of its computation.

        Raises:
            UnetrError: if a worker cannot be made.
        """
        run = _Run(iter(items), recipe, len(self.devices))
        threads = [
            threading.Thread(target=run.lane, args=(device,), name=f"worker {device}") for device in self.devices
        ]
        for thread in threads:
            thread.start()
        try:
            yield from run.finished(len(threads))
        finally:
            run.stopping.set()
            for thread in threads:
                thread.join()


class _Run(Generic[Item, Answer]):
    """The state that the threads of one run share."""

    def __init__(self, items: Iterator[Item], recipe: Callable[[], Recipe[Item, Answer]], lanes: int) -> None:
        self.stopping = threading.Event()
        self._items, self._recipe = items, recipe
        self._pulling = threading.Lock()
        # bounded, so that with a slow disk the devices wait instead of filling the memory with masks
        self._out: queue.Queue[Finished[Item, Answer] | BaseException | None] = queue.Queue(lanes)

    def finished(self, lanes: int) -> Iterator[Finished[Item, Answer]]:
        while lanes:
            message = self._out.get()
            if isinstance(message, BaseException):
                raise message
            if message is None:
                lanes -= 1
            else:
                yield message

    def lane(self, device: str) -> None:
        """The work of one device, from its first item to the last."""
        try:
            with (
                interruptible_by(self._check),
                ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader,
                ThreadPoolExecutor(1, thread_name_prefix="finish") as finisher,
            ):
                hands: _Hands[Item, Answer] = _Hands(device, reader)
                ahead = self._pull(hands)
                before: Future[None] | None = None
                while ahead is not None:
                    item, worker, reading = ahead
                    reading.exception()  # waits, so that at most one case is read at a time
                    ahead = self._pull(hands)
                    computed = _compute(item, worker, reading)
                    if before is not None:
                        before.result()  # waits, so that cases are finished one at a time, in order
                    before = finisher.submit(self._finish, computed)
                if before is not None:
                    before.result()
            self._put(None)
        except InterruptedWork:
            return  # the consumer has ended
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            self._put(error)

    def _pull(self, hands: _Hands[Item, Answer]) -> tuple[Item, Worker[Item, Answer], Future[Any]] | None:
        self._check()
        with self._pulling:
            item = next(self._items, None)
            recipe = self._recipe() if item is not None else None
        if item is None or recipe is None:
            return None
        worker = hands.worker(recipe)
        return item, worker, hands.reader.submit(worker.read, item)

    def _finish(self, computed: Finished[Item, Any]) -> None:
        self._put(finish(computed))

    def _put(self, message: Finished[Item, Answer] | BaseException | None) -> None:
        while not self.stopping.is_set():
            try:
                return self._out.put(message, timeout=SECONDS_BETWEEN_CHECKS)
            except queue.Full:
                continue

    def _check(self) -> None:
        if self.stopping.is_set():
            raise InterruptedWork


@dataclass
class _Hands(Generic[Item, Answer]):
    """What a lane works with."""

    device: str
    reader: ThreadPoolExecutor
    made: tuple[str, Worker[Item, Answer]] | None = None

    def worker(self, recipe: Recipe[Item, Answer]) -> Worker[Item, Answer]:
        if self.made is None or self.made[0] != recipe.key:
            self.made = (recipe.key, recipe.make(self.device))
        return self.made[1]


def _compute(item: Item, worker: Worker[Item, Answer], reading: Future[Any]) -> Finished[Item, Any]:
    """The result of an item, which is a :class:`Rest` if some work remains."""
    try:
        return Finished(item, worker.compute(reading.result()))
    except UnetrError as error:
        return failed(item, error)


def finish(computed: Finished[Item, Any]) -> Finished[Item, Any]:
    """Do the remaining work of a case, if there is any."""
    if not isinstance(computed.answer, Rest):
        return computed
    try:
        return Finished(computed.item, computed.answer.finish())
    except UnetrError as error:
        return failed(computed.item, error)


def failed(item: Item, error: UnetrError) -> Finished[Item, Any]:
    """The result of a case that ended with one of this project's errors."""
    return Finished(item, problem=str(error), refused=isinstance(error, InputError))
