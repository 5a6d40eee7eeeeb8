"""What runs cases on several devices: each pulls its next case when it is ready, and reads it while it computes."""

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
    """What is left of a case once the device is free for the next.

    Attributes:
        finish: makes the answer, in another thread.
    """

    finish: Callable[[], Given]


class Worker(Protocol[Taken, Given]):
    """What holds the weights on one device. ``read`` runs in another thread, while ``compute`` has the case before."""

    def read(self, item: Taken) -> Any:
        """Everything before the device is needed."""

    def compute(self, ready: Any) -> Given | Rest[Given]:
        """What needs the device, of what ``read`` returned; the answer, or what is left to do for it."""


@dataclass(frozen=True)
class Recipe(Generic[Item, Answer]):
    """How a worker is made.

    Attributes:
        key: another key is another worker: one with newer weights, say.
        make: makes one for a device; pickled where the worker is to be in another process.
    """

    key: str
    make: Callable[[str], Worker[Item, Answer]]


@dataclass(frozen=True)
class Finished(Generic[Item, Answer]):
    """A case that is done with: its answer, or else the reason why there is none.

    Attributes:
        refused: whether the case itself is at fault, rather than a server or a disk: it need not be tried again.
    """

    item: Item
    answer: Answer | None = None
    problem: str = ""
    refused: bool = False


class Engine(Protocol):
    """Runs cases on devices: of this machine, or of a Ray cluster."""

    def run(
        self, items: Iterable[Item], recipe: Callable[[], Recipe[Item, Answer]]
    ) -> Iterator[Finished[Item, Answer]]:
        """Run all items; their results come in the order in which they finish.

        Args:
            items: taken one by one, as they are needed.
            recipe: asked before each item for the worker that is to have it.
        """


class LocalEngine:
    """The devices of this process, a thread each.

    A worker that raises one of this project's errors has finished its case without an answer; any other error ends
    the run.

    Args:
        devices: PyTorch's names; one that is there twice gets two workers.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)

    def run(
        self, items: Iterable[Item], recipe: Callable[[], Recipe[Item, Answer]]
    ) -> Iterator[Finished[Item, Answer]]:
        """As :class:`Engine`; a run that is left ends before the next window of what it computes.

        Raises:
            UnetrError: when a worker cannot be made.
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
    """What the lanes of one run share."""

    def __init__(self, items: Iterator[Item], recipe: Callable[[], Recipe[Item, Answer]], lanes: int) -> None:
        self.stopping = threading.Event()
        self._items, self._recipe = items, recipe
        self._pulling = threading.Lock()
        # bounded, so that a slow disk holds the devices up before it fills the memory with masks
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
        """One device's work, from its first item to the last."""
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
                    reading.exception()  # waits: never more than one case is being read
                    ahead = self._pull(hands)
                    computed = _compute(item, worker, reading)
                    if before is not None:
                        before.result()  # waits: never more than one case is being finished, and in their order
                    before = finisher.submit(self._finish, computed)
                if before is not None:
                    before.result()
            self._put(None)
        except InterruptedWork:
            return  # nobody listens any more
        except BaseException as error:  # noqa: BLE001 - raised again where the answers are taken
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
    """The answer is still a :class:`Rest` where something is left to do."""
    try:
        return Finished(item, worker.compute(reading.result()))
    except UnetrError as error:
        return failed(item, error)


def finish(computed: Finished[Item, Any]) -> Finished[Item, Any]:
    """Do what is left of a case, where something is."""
    if not isinstance(computed.answer, Rest):
        return computed
    try:
        return Finished(computed.item, computed.answer.finish())
    except UnetrError as error:
        return failed(computed.item, error)


def failed(item: Item, error: UnetrError) -> Finished[Item, Any]:
    """A case that one of this project's errors has ended."""
    return Finished(item, problem=str(error), refused=isinstance(error, InputError))
