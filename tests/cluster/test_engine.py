"""Cases over several devices: who takes what when, with workers that wait for events and not for time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lib.cluster.engine import LocalEngine, Recipe, Rest
from lib.errors import CheckpointError, ImageError

PATIENCE_SECONDS = 20


class Worker:
    """Hands items on, by way of whatever ``read`` and ``compute`` do beside that."""

    def __init__(
        self, read: Callable[[Any], object] = lambda item: None, compute: Callable[[Any], object] = lambda item: None
    ) -> None:
        self._read, self._compute = read, compute

    def read(self, item: Any) -> Any:
        self._read(item)
        return item

    def compute(self, ready: Any) -> Any:
        self._compute(ready)
        return ready


def _recipe(worker: Worker) -> Callable[[], Recipe[Any, Any]]:
    return lambda: Recipe("one", lambda device: worker)


def test_next_case_is_read_while_one_is_computed_and_no_more_than_that() -> None:
    second_is_read = threading.Event()
    read: list[int] = []

    def note(item: int) -> None:
        read.append(item)
        if item == 1:
            second_is_read.set()

    def compute(item: int) -> None:
        if item == 0:
            assert second_is_read.wait(PATIENCE_SECONDS), "nothing was read while this was computed"
            assert read == [0, 1]

    finished = list(LocalEngine(["cpu"]).run(range(4), _recipe(Worker(note, compute))))
    assert [one.answer for one in finished] == [0, 1, 2, 3] and read == [0, 1, 2, 3]


def test_devices_pull_from_one_queue_so_that_a_long_case_holds_nobody_else_up() -> None:
    others_done = threading.Event()
    left = set(range(1, 9))
    made: list[str] = []

    def compute(item: int) -> None:
        if item == 0:
            assert others_done.wait(PATIENCE_SECONDS), "the other device did not take the rest"

    def make(device: str) -> Worker:
        made.append(device)
        return Worker(compute=compute)

    engine = LocalEngine(["cuda:0", "cuda:1"])
    order = []
    # the one case that the busy device has read ahead is all that waits for it
    for one in engine.run(range(9), lambda: Recipe("one", make)):
        order.append(one.item)
        left.discard(one.item)
        if len(left) <= 1:
            others_done.set()
    assert sorted(order) == list(range(9)) and order.index(0) >= 7
    assert sorted(made) == ["cuda:0", "cuda:1"]


def test_project_error_finishes_its_case_and_any_other_ends_the_run() -> None:
    def compute(item: int) -> None:
        if item == 1:
            raise ImageError("it is flat")
        if item == 3:
            raise RuntimeError("a fault of ours")

    found = []
    with pytest.raises(RuntimeError, match="a fault of ours"):
        for one in LocalEngine(["cpu"]).run(range(6), _recipe(Worker(compute=compute))):
            found.append((one.item, one.problem))
    assert found == [(0, ""), (1, "it is flat"), (2, "")]


def test_worker_that_cannot_be_made_ends_the_run() -> None:
    def make(device: str) -> Worker:
        raise CheckpointError("damaged weights")

    with pytest.raises(CheckpointError, match="damaged weights"):
        list(LocalEngine(["cpu", "cpu"]).run(range(3), lambda: Recipe("one", make)))


def test_cases_are_taken_as_they_are_needed_and_a_run_that_is_left_ends() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            taken.append(number)
            yield number

    run = LocalEngine(["cpu"]).run(items(), _recipe(Worker()))
    assert next(run).item == 0
    run.close()
    assert len(taken) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("worker", "read-ahead"))]


def test_newer_recipe_is_used_from_its_next_case_on() -> None:
    class Versioned(Worker):
        def __init__(self, version: str) -> None:
            super().__init__()
            self.version = version

        def compute(self, ready: Any) -> Any:
            return self.version

    asked: list[int] = []

    def recipe() -> Recipe[Any, Any]:
        asked.append(0)
        version = "v0001" if len(asked) <= 3 else "v0002"
        return Recipe(version, lambda device: Versioned(version))

    finished = list(LocalEngine(["cpu"]).run(range(6), recipe))
    assert [one.answer for one in finished] == ["v0001"] * 3 + ["v0002"] * 3


def test_rest_of_a_case_is_done_while_the_next_is_computed_and_in_order() -> None:
    next_is_computed, threads = threading.Event(), set()

    def finish(item: int) -> int:
        threads.add(threading.current_thread().name)
        if item == 0:
            assert next_is_computed.wait(PATIENCE_SECONDS), "nothing was computed while this was finished"
        if item == 2:
            raise ImageError("it could not be restored")
        return 10 * item

    class Halves(Worker):
        def compute(self, ready: Any) -> Any:
            if ready == 1:
                next_is_computed.set()
            return ready if ready == 3 else Rest(lambda: finish(ready))

    found = list(LocalEngine(["cpu"]).run(range(5), _recipe(Halves())))
    assert [(one.answer, one.problem) for one in found] == [
        (0, ""), (10, ""), (None, "it could not be restored"), (3, ""), (40, "")
    ]  # fmt: skip
    assert len(threads) == 1


def test_fault_in_the_rest_of_a_case_ends_the_run() -> None:
    def fault() -> None:
        raise RuntimeError("a fault of ours")

    class Halves(Worker):
        def compute(self, ready: Any) -> Any:
            return Rest(fault)

    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(LocalEngine(["cpu"]).run(range(3), _recipe(Halves())))
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("worker", "read-ahead", "finish"))
    ]
