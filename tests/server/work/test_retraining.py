"""How much of a processor the retrain policy takes from requests, with everything that it asks handed in."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from lib.configs.settings import Settings
from lib.infers.devices.lanes import Lanes
from lib.server.http.events import Changes
from lib.server.tasks import TasksByName
from lib.server.work.pause import Pause
from lib.server.work.retraining import SHARE_OF_TIME, Retrainer

SECONDS_OF_A_LOOK = 0.02


class _Task:
    """A model's training, whose labels take a while to go through."""

    def __init__(self) -> None:
        self.looks = 0
        self.versions = SimpleNamespace(list=list)

    def validate_request(self, request: dict[str, Any]) -> None:
        """Every one is valid."""

    def serving(self) -> tuple[str, str]:
        return "", ""

    def submitted(self, datastore: object) -> Any:
        self.looks += 1
        until = time.thread_time() + SECONDS_OF_A_LOOK
        while time.thread_time() < until:
            pass
        return SimpleNamespace(cases=[])


async def _save_labels(retrainer: Any, seconds: float) -> float:
    """Tell of one label after the other; returns for how long."""
    start = time.monotonic()
    retrainer.start()
    while time.monotonic() - start < seconds:
        retrainer.on_label_saved(None)
        time.sleep(0.002)
    retrainer.stop()
    return time.monotonic() - start


def test_labels_in_a_row_are_looked_at_together() -> None:
    """Each was followed by a look at all labels there are, which took the interpreter from requests all the while."""
    task: Any = _Task()
    jobs = SimpleNamespace(open=lambda _: 0, waiting_for_room=list)
    journal = SimpleNamespace(
        failures=lambda *_: [],
        others_running=lambda _: False,
        lock=lambda _: SimpleNamespace(acquire=lambda timeout: nullcontext()),
    )
    handed_in: list[Any] = [Settings(), TasksByName({"tiny": task}, "trainer"), None, jobs, journal]
    handed_in += [SimpleNamespace(lanes=Lanes.of("cpu")), Pause(), TasksByName({}, "model"), Changes()]
    seconds = asyncio.run(_save_labels(Retrainer(*handed_in), 1.5))
    most = 1 + seconds * SHARE_OF_TIME / SECONDS_OF_A_LOOK * 1.1
    assert 1 < task.looks <= most
