"""Ray (https://www.ray.io) as the engine: workers on the machines of a cluster, and cases that outlive them.

A worker is an actor: one for each GPU, or for a number of cores where no node has one. It holds its model from its
first case to its last, and reads a case while it computes another. An actor that is gone has its cases run elsewhere.
What ended its process is looked for among those that it had: each of them runs alone from then on, and one that ends
three workers is given up. A node that is lost is nobody's fault, unless that happens again and again.

Code, weights and what is found travel by Ray. Whoever reaches Ray's ports can run code on its machines: they belong
into a closed network. Ray's own authentication by token is used where it is set up.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from lib.cluster.engine import Finished, Recipe, Worker
from lib.errors import ConfigError, InputError, UnetrError

logger = logging.getLogger("unetr.cluster")

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MOST_DEATHS = 3
MOST_LOSSES = 10
CASES_IN_HAND = 2
"""Of a worker: one that is computed, and one that is read meanwhile."""
MOST_DEFAULT_CORES = 4
MOST_FAILED_STARTS = 5
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_BETWEEN_COMPLAINTS = 60.0
LIBRARY = Path(__file__).resolve().parents[1]


class RayEngine:
    """Workers on a Ray cluster. The methods are those of :class:`lib.cluster.engine.Engine`.

    Args:
        address: ``auto`` or ``host:port`` on a machine of the cluster, ``ray://host:port`` elsewhere.
        cores: of a worker; at most four by default, and no more than the smallest node has.
    """

    def __init__(self, address: str, cores: int | None = None) -> None:
        self._address, self._cores = address, cores

    def run(
        self, items: Iterable[Item], recipe: Callable[[], Recipe[Item, Answer]]
    ) -> Iterator[Finished[Item, Answer]]:
        """As :class:`lib.cluster.engine.Engine`.

        Raises:
            ConfigError: when there is no such cluster, Ray is not installed, or workers cannot be started.
            UnetrError: when a worker cannot be made of the recipe.
        """
        ray = import_ray()
        with _connected(ray, self._address):
            crew = _Crew(ray, self._cores)
            try:
                yield from _Run(ray, crew, iter(items), recipe).finished()
            finally:
                crew.dismiss()


def import_ray() -> Any:
    """Ray, which is optional.

    Raises:
        ConfigError: when it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before it is imported: it would report to its makers
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed; python3 run.py setup --cluster installs it") from error
    return ray


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """With a connection to the cluster, which is ended unless there was one."""
    if ray.is_initialized():
        yield
        return
    environment = {
        "py_modules": [str(LIBRARY)],  # so that all nodes compute with this very code
        "excludes": ["**/__pycache__/**"],
        "env_vars": {"OMP_WAIT_POLICY": "passive"},
    }
    try:
        ray.init(address=address, runtime_env=environment, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"there is no Ray cluster to be reached at {address!r}: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


class _RemoteWorker:
    """What runs in an actor's process: a worker, and one case beside the other."""

    def __init__(self, cores: int) -> None:
        torch.set_num_threads(cores)
        self._computing, self._making = threading.Lock(), threading.Lock()
        self._made: tuple[str, Worker[Any, Any]] | None = None

    def is_there(self) -> bool:
        """Answers once the process is."""
        return True

    def run(self, key: str, make: list[Any], item: Any) -> Finished[Any, Any]:
        """Run a case; ``make`` holds a reference to what makes the worker, which is fetched once."""
        worker = self._worker(key, make)
        try:
            ready = worker.read(item)
            with self._computing:
                return Finished(item, worker.compute(ready))
        except UnetrError as error:
            return Finished(item, problem=str(error), refused=isinstance(error, InputError))

    def _worker(self, key: str, make: list[Any]) -> Worker[Any, Any]:
        with self._making:
            if self._made is None or self._made[0] != key:
                self._made = (key, import_ray().get(make[0])(""))  # Ray has chosen the GPU
            return self._made[1]


@dataclass
class _Try(Generic[Item]):
    """A case, and what happened to the workers that had it."""

    item: Item
    deaths: int = 0
    losses: int = 0


@dataclass(eq=False)
class _Hand:
    """An actor, and the cases that it has."""

    actor: Any
    starting: Any
    cases: dict[Any, _Try[Any]] = field(default_factory=dict)
    reserved: _Try[Any] | None = None

    def is_free(self) -> bool:
        alone = any(one.deaths for one in self.cases.values())
        return self.starting is None and self.reserved is None and not alone and len(self.cases) < CASES_IN_HAND


class _Crew:
    """The actors: as many as the nodes that there are now have room for."""

    def __init__(self, ray: Any, cores: int | None) -> None:
        self._ray, self._cores = ray, cores
        self.hands: list[_Hand] = []
        self._looked = self._complained = -float("inf")
        self._failed_starts = 0

    def fill(self) -> None:
        """Start actors where there is room, and give those up that wait for a node that is gone."""
        if time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        options, wanted = self._room()
        for hand in [hand for hand in self.hands if hand.starting is not None][: max(0, len(self.hands) - wanted)]:
            self.drop(hand)
        for _ in range(wanted - len(self.hands)):
            actor = self._ray.remote(**options)(_RemoteWorker).remote(options["num_cpus"])
            self.hands.append(_Hand(actor, actor.is_there.remote()))
        if not any(hand.starting is None for hand in self.hands):
            self._complain(wanted)

    def _room(self) -> tuple[dict[str, Any], int]:
        """What an actor takes, and how many there can be."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus, cpus = ([int(node.get(kind, 0)) for node in nodes if node.get("CPU", 0) >= 1] for kind in ("GPU", "CPU"))
        shares = [cpu // gpu for cpu, gpu in zip(cpus, gpus, strict=True) if gpu] if any(gpus) else cpus
        cores = self._cores or max(1, min([MOST_DEFAULT_CORES, *shares]))
        options = {"num_cpus": cores, "max_concurrency": CASES_IN_HAND, "max_restarts": 0, "max_task_retries": 0}
        if any(gpus):
            return options | {"num_gpus": 1}, sum(gpus)
        return options, sum(cpu // cores for cpu in cpus)

    def _complain(self, wanted: int) -> None:
        now = time.monotonic()
        if self._complained == -float("inf"):
            self._complained = now
        elif now - self._complained > SECONDS_BETWEEN_COMPLAINTS:
            self._complained = now
            logger.warning("no worker of the cluster answers yet; there is room for %d", wanted)

    def started(self, hand: _Hand) -> None:
        """An actor that was being started answers, or it does not.

        Raises:
            ConfigError: when that happens again and again.
        """
        errors = self._ray.exceptions
        try:
            self._ray.get(hand.starting)
            hand.starting, self._failed_starts = None, 0
        except (errors.RayActorError, errors.RuntimeEnvSetupError, errors.NodeDiedError) as error:
            self._failed_starts += 1
            self.drop(hand)
            if self._failed_starts >= MOST_FAILED_STARTS or isinstance(error, errors.RuntimeEnvSetupError):
                reason = " ".join(str(error).split())[:500]
                raise ConfigError(f"the cluster starts no workers: {reason}") from error

    def drop(self, hand: _Hand) -> None:
        """End an actor."""
        self.hands.remove(hand)
        self._ray.kill(hand.actor)

    def dismiss(self) -> None:
        """End all actors."""
        for hand in list(self.hands):
            self.drop(hand)


class _Run(Generic[Item, Answer]):
    """One run over a crew."""

    def __init__(
        self, ray: Any, crew: _Crew, items: Iterator[Item], recipe: Callable[[], Recipe[Item, Answer]]
    ) -> None:
        self._ray, self._crew, self._items, self._recipe = ray, crew, items, recipe
        self._again: deque[_Try[Item]] = deque()
        self._suspects: deque[_Try[Item]] = deque()
        self._given_up: list[Finished[Item, Answer]] = []
        self._exhausted = False
        self._made: tuple[str, Any] | None = None

    def finished(self) -> Iterator[Finished[Item, Answer]]:
        while True:
            self._crew.fill()
            self._hand_out()
            refs = {ref: hand for hand in self._crew.hands for ref in hand.cases}
            if self._exhausted and not (refs or self._again or self._suspects or self._reserved()):
                return
            starting = {hand.starting: hand for hand in self._crew.hands if hand.starting is not None}
            waited = [*refs, *starting]
            if not waited:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            done, _ = self._ray.wait(waited, num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
            for ref in done:
                if ref in starting:
                    self._crew.started(starting[ref])
                elif (answer := self._take(ref, refs[ref])) is not None:
                    yield answer
            while self._given_up:
                yield self._given_up.pop()

    def _reserved(self) -> bool:
        return any(hand.reserved is not None for hand in self._crew.hands)

    def _hand_out(self) -> None:
        """Give each worker that has room its next case; suspects get one that has nothing else in hand."""
        for hand in sorted(self._crew.hands, key=lambda hand: len(hand.cases)):
            if self._suspects and hand.is_free():
                hand.reserved = self._suspects.popleft()
            if hand.reserved is not None and not hand.cases:
                one, hand.reserved = hand.reserved, None
                self._give(hand, one)
        # one each, then the second: the last cases of a run are not piled on one worker
        for count in range(CASES_IN_HAND):
            for hand in self._crew.hands:
                if hand.is_free() and len(hand.cases) <= count and (next_one := self._next()) is not None:
                    self._give(hand, next_one)

    def _next(self) -> _Try[Item] | None:
        if self._again:
            return self._again.popleft()
        if not self._exhausted:
            for item in self._items:
                return _Try(item)
            self._exhausted = True
        return None

    def _give(self, hand: _Hand, one: _Try[Item]) -> None:
        recipe = self._recipe()
        if self._made is None or self._made[0] != recipe.key:
            self._made = (recipe.key, self._ray.put(recipe.make))
        key, make = self._made
        hand.cases[hand.actor.run.remote(key, [make], one.item)] = one

    def _take(self, ref: Any, hand: _Hand) -> Finished[Item, Answer] | None:
        """A case's answer; None where its worker is gone, or was already found to be."""
        if ref not in hand.cases:
            return None
        errors = self._ray.exceptions
        try:
            answer: Finished[Item, Answer] = self._ray.get(ref)
        except errors.RayTaskError as error:
            raise (error.cause or error) from None
        except errors.ObjectLostError as error:  # computed, and gone with the node before it was taken
            self._lost(hand.cases.pop(ref), error)
            return None
        except (
            errors.RayActorError,
            errors.NodeDiedError,
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
        ) as error:
            self._worker_is_gone(hand, error)
            return None
        del hand.cases[ref]
        return answer

    def _worker_is_gone(self, hand: _Hand, error: Exception) -> None:
        died = _ended_by_itself(error)
        logger.warning("a worker is gone with %d cases, which run elsewhere: %s", len(hand.cases), _first_line(error))
        cases = [*hand.cases.values(), *([hand.reserved] if hand.reserved is not None else [])]
        in_process = list(hand.cases.values())
        self._crew.drop(hand)
        for one in cases:
            if died and one in in_process:
                one.deaths += 1
            self._lost(one, error, died)

    def _lost(self, one: _Try[Item], error: Exception, died: bool = False) -> None:
        one.losses += not died
        if one.deaths >= MOST_DEATHS or one.losses >= MOST_LOSSES:
            what = f"it ended its worker {one.deaths} times" if died else f"its worker was lost {one.losses} times"
            self._given_up.append(Finished(one.item, problem=f"{what}: {_first_line(error)}", refused=True))
        elif one.deaths:
            self._suspects.append(one)
        else:
            self._again.append(one)


def _ended_by_itself(error: Exception) -> bool:
    """Whether an actor's own process ended, rather than its node being lost."""
    return type(error).__name__ == "OutOfMemoryError" or "its worker process has died" in str(error)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "is dead because" in line] or lines[:1]
    return (telling[0] if telling else type(error).__name__)[:300]
