"""Reports whether the live weights load, without making the caller wait."""

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
        """Load its current weights, unless they are loaded, and describe them; they stay loaded."""


class WeightsLoading:
    """Loads the current weights of models in a separate thread.

    Loading new weights takes seconds, and a monitor with a short timeout asks every few seconds.

    Args:
        models: models by name.
        seconds: how long a caller waits for weights that are not loaded yet.
    """

    def __init__(self, models: Mapping[str, Loadable], seconds: float = SECONDS_TO_WAIT) -> None:
        self._models, self._seconds = models, seconds
        self._thread = ThreadPoolExecutor(1, "weights")
        self._lock = threading.Lock()
        self._begun: dict[str, Future[dict[str, str]]] = {}

    def states(self) -> tuple[dict[str, str], list[str]]:
        """The version of each model's weights, and a sentence for each model that cannot compute now.

        Weights that are not loaded yet are loaded in the background from now on; their version is ``loading`` until
        then.
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
    """The version, and its problem."""
    if not loaded.done():
        return "loading", "its weights are being loaded"
    try:
        return loaded.result()["version"], ""
    except ModelNotReadyError:
        return "untrained", ""
    except CheckpointError as error:
        return "unusable", str(error)
