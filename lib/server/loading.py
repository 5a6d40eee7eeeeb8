"""Whether the served weights load, for whoever asks and does not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from lib.errors import CheckpointError, ModelNotReadyError

SECONDS_TO_WAIT = 0.2


class Loadable(Protocol):
    """A model with weights."""

    def load(self) -> dict[str, str]:
        """Load its newest weights, unless they are there, and say what they are; they stay loaded."""


class WeightsLoading:
    """Loads the newest weights of models in a thread of its own.

    Weights of a new version take seconds to load, and a monitor asks every few seconds with little patience.

    Args:
        models: by name.
        seconds: that whoever asks waits for weights that are not there yet.
    """

    def __init__(self, models: Mapping[str, Loadable], seconds: float = SECONDS_TO_WAIT) -> None:
        self._models, self._seconds = models, seconds
        self._thread = ThreadPoolExecutor(1, "weights")
        self._lock = threading.Lock()
        self._begun: dict[str, Future[dict[str, str]]] = {}

    def states(self) -> tuple[dict[str, str], list[str]]:
        """The version of each model's weights, and a sentence for those with which nothing can be computed now.

        Weights that are not loaded yet are, from now on, in the background: the version is ``loading`` until they are.
        """
        with self._lock:
            asked = {name: self._begin(name) for name in self._models}
        wait(asked.values(), self._seconds)
        versions, problems = {}, []
        for name, loaded in asked.items():
            versions[name], problem = _state(loaded)
            if problem:
                problems.append(f"model {name!r}: {problem}")
        return versions, problems

    def _begin(self, name: str) -> Future[dict[str, str]]:
        known = self._begun.get(name)
        if known is None or known.done():
            known = self._begun[name] = self._thread.submit(self._models[name].load)
        return known


def _state(loaded: Future[dict[str, str]]) -> tuple[str, str]:
    """The version, and what is wrong."""
    if not loaded.done():
        return "loading", "its weights are being loaded"
    try:
        return loaded.result()["version"], ""
    except ModelNotReadyError:
        return "untrained", ""
    except CheckpointError as error:
        return "unusable", str(error)
