"""The workers of a run on a Ray cluster: as many actors as the nodes have room for, and the cases of each."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from lib.cluster.engine import Finished, Worker, failed, finish
from lib.cluster.ray_connection import import_ray
from lib.errors import ConfigError, UnetrError

logger = logging.getLogger("unetr.cluster")

Item = TypeVar("Item")

CASES_IN_HAND = 2
"""Cases of a worker: one that is computed, and one that is read meanwhile."""
MOST_DEFAULT_CORES = 4
MOST_FAILED_STARTS = 5
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_BETWEEN_COMPLAINTS = 60.0


class RemoteWorker:
    """Runs in an actor's process: a worker that reads one case while it computes another."""

    def __init__(self, cores: int) -> None:
        torch.set_num_threads(cores)
        self._computing, self._making = threading.Lock(), threading.Lock()
        self._made: tuple[str, Worker[Any, Any]] | None = None

    def is_there(self) -> bool:
        """Return as soon as the process has started."""
        return True

    def run(self, key: str, make: list[Any], item: Any) -> Finished[Any, Any]:
        """Run a case; ``make`` holds a reference to the worker's factory, which is fetched once."""
        worker = self._worker(key, make)
        try:
            ready = worker.read(item)
            with self._computing:
                computed = Finished(item, worker.compute(ready))
        except UnetrError as error:
            return failed(item, error)
        return finish(computed)

    def _worker(self, key: str, make: list[Any]) -> Worker[Any, Any]:
        with self._making:
            if self._made is None or self._made[0] != key:
                self._made = (key, import_ray().get(make[0])(""))  # Ray has chosen the GPU
            return self._made[1]


@dataclass
class Try(Generic[Item]):
    """A case, and the history of the workers that had it."""

    item: Item
    deaths: int = 0
    losses: int = 0


@dataclass(eq=False)
class Hand:
    """An actor and its cases."""

    actor: Any
    starting: Any
    cases: dict[Any, Try[Any]] = field(default_factory=dict)
    reserved: Try[Any] | None = None

    def is_free(self) -> bool:
        alone = any(one.deaths for one in self.cases.values())
        return self.starting is None and self.reserved is None and not alone and len(self.cases) < CASES_IN_HAND


class Crew:
    """The actors, as many as the current nodes have room for."""

    def __init__(self, ray: Any, cores: int | None) -> None:
        self._ray, self._cores = ray, cores
        self.hands: list[Hand] = []
        self._looked = self._complained = -float("inf")
        self._failed_starts = 0

    def fill(self) -> None:
        """Start actors where there is room, and drop those that wait for a node that no longer exists."""
        if time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        options, wanted = self._room()
        for hand in [hand for hand in self.hands if hand.starting is not None][: max(0, len(self.hands) - wanted)]:
            self.drop(hand)
        for _ in range(wanted - len(self.hands)):
            actor = self._ray.remote(**options)(RemoteWorker).remote(options["num_cpus"])
            self.hands.append(Hand(actor, actor.is_there.remote()))
        if not any(hand.starting is None for hand in self.hands):
            self._complain(wanted)

    def _room(self) -> tuple[dict[str, Any], int]:
        """The resources of an actor, and the possible number of actors."""
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

    def started(self, hand: Hand) -> None:
        """Handle the response of an actor that was being started, or its failure.

        Raises:
            ConfigError: if actors fail to start repeatedly.
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

    def drop(self, hand: Hand) -> None:
        """End an actor."""
        self.hands.remove(hand)
        self._ray.kill(hand.actor)

    def dismiss(self) -> None:
        """End all actors."""
        for hand in list(self.hands):
            self.drop(hand)
