"""Ray (https://www.ray.io) as the engine: workers on the machines of a cluster, and cases that survive the loss of a
worker.

A worker is an actor: one for each GPU, or for a number of cores if no node has a GPU. It keeps its model from its first
case to its last, and reads a case while it computes another. If an actor is lost, its cases run on other actors. To
find a case that crashes its worker, each case of a crashed actor runs alone from then on, and a case that crashes three
workers is given up. The loss of a node is not attributed to a case, unless it happens repeatedly.

Code, weights and results are sent by Ray. Anyone who can reach Ray's ports can run code on its machines, so they must
be in a closed network. Ray's own token authentication is used if it is configured.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from lib.cluster.engine import Finished, Recipe
from lib.cluster.ray_connection import connected, import_ray
from lib.cluster.ray_crew import CASES_IN_HAND, SECONDS_BETWEEN_LOOKS, Crew, Hand, Try

logger = logging.getLogger("unetr.cluster")

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MOST_DEATHS = 3
MOST_LOSSES = 10


class RayEngine:
    """Workers on a Ray cluster, with the interface of :class:`lib.cluster.engine.Engine`.

    Args:
        address: ``auto`` or ``host:port`` on a machine of the cluster, ``ray://host:port`` on other machines.
        cores: cores of a worker; by default at most four, and not more than the smallest node has.
    """

    def __init__(self, address: str, cores: int | None = None) -> None:
        self._address, self._cores = address, cores

    def run(
        self, items: Iterable[Item], recipe: Callable[[], Recipe[Item, Answer]]
    ) -> Iterator[Finished[Item, Answer]]:
        """See :class:`lib.cluster.engine.Engine`.

        Raises:
            ConfigError: if there is no such cluster, Ray is not installed, or workers cannot be started.
            UnetrError: if a worker cannot be made from the recipe.
        """
        ray = import_ray()
        with connected(ray, self._address):
            crew = Crew(ray, self._cores)
            try:
                yield from _Run(ray, crew, iter(items), recipe).finished()
            finally:
                crew.dismiss()


class _Run(Generic[Item, Answer]):
    """One run on a crew."""

    def __init__(self, ray: Any, crew: Crew, items: Iterator[Item], recipe: Callable[[], Recipe[Item, Answer]]) -> None:
        self._ray, self._crew, self._items, self._recipe = ray, crew, items, recipe
        self._again: deque[Try[Item]] = deque()
        self._suspects: deque[Try[Item]] = deque()
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
        """Give each free worker its next case; suspected cases get a worker without other cases."""
        for hand in sorted(self._crew.hands, key=lambda hand: len(hand.cases)):
            if self._suspects and hand.is_free():
                hand.reserved = self._suspects.popleft()
            if hand.reserved is not None and not hand.cases:
                one, hand.reserved = hand.reserved, None
                self._give(hand, one)
        # every worker gets one case before any gets a second, which balances the end of a run
        for count in range(CASES_IN_HAND):
            for hand in self._crew.hands:
                if hand.is_free() and len(hand.cases) <= count and (next_one := self._next()) is not None:
                    self._give(hand, next_one)

    def _next(self) -> Try[Item] | None:
        if self._again:
            return self._again.popleft()
        if not self._exhausted:
            for item in self._items:
                return Try(item)
            self._exhausted = True
        return None

    def _give(self, hand: Hand, one: Try[Item]) -> None:
        recipe = self._recipe()
        if self._made is None or self._made[0] != recipe.key:
            self._made = (recipe.key, self._ray.put(recipe.make))
        key, make = self._made
        hand.cases[hand.actor.run.remote(key, [make], one.item)] = one

    def _take(self, ref: Any, hand: Hand) -> Finished[Item, Answer] | None:
        """The result of a case; None if its worker is lost, or was known to be lost before."""
        if ref not in hand.cases:
            return None
        errors = self._ray.exceptions
        try:
            answer: Finished[Item, Answer] = self._ray.get(ref)
        except errors.RayTaskError as error:
            raise (error.cause or error) from None
        except errors.ObjectLostError as error:  # computed, but lost with the node before it was fetched
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

    def _worker_is_gone(self, hand: Hand, error: Exception) -> None:
        died = _ended_by_itself(error)
        logger.warning("a worker is gone with %d cases, which run elsewhere: %s", len(hand.cases), _first_line(error))
        cases = [*hand.cases.values(), *([hand.reserved] if hand.reserved is not None else [])]
        in_process = list(hand.cases.values())
        self._crew.drop(hand)
        for one in cases:
            if died and one in in_process:
                one.deaths += 1
            self._lost(one, error, died)

    def _lost(self, one: Try[Item], error: Exception, died: bool = False) -> None:
        one.losses += not died
        if one.deaths >= MOST_DEATHS or one.losses >= MOST_LOSSES:
            what = f"it ended its worker {one.deaths} times" if died else f"its worker was lost {one.losses} times"
            self._given_up.append(Finished(one.item, problem=f"{what}: {_first_line(error)}", refused=True))
        elif one.deaths:
            self._suspects.append(one)
        else:
            self._again.append(one)


def _ended_by_itself(error: Exception) -> bool:
    """Whether an actor's own process ended, and not its node."""
    return type(error).__name__ == "OutOfMemoryError" or "its worker process has died" in str(error)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "is dead because" in line] or lines[:1]
    return (telling[0] if telling else type(error).__name__)[:300]
