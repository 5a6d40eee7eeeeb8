"""Trainings that a full disk has ended go on by themselves once there is room again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from lib.server.work.jobs import Job, Jobs
from lib.storage.disk import MIB, has_room

logger = logging.getLogger("unetr.server")

SECONDS_BETWEEN_LOOKS = 10.0
LONGEST_SECONDS_BETWEEN_LOOKS = 600.0
LEAST_ROOM_BYTES = 32 * MIB
TIMES_THE_LARGEST = 3
"""A run writes its state, which holds the best weights too, and a version."""


class WaitingForRoom:
    """Looks now and then whether trainings that wait have room to go on.

    Args:
        jobs: of the server.
        folder_of: a training's folder, ``model/<preset>/runs/<run>``.
        seconds: between two looks; twice as long each time that a training goes on, since it may be too little again.
    """

    def __init__(self, jobs: Jobs, folder_of: Callable[[Job], Path], seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        self._jobs, self._folder_of, self._seconds = jobs, folder_of, seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="waiting-for-room", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End; what waits does so until the next start."""
        self._closing.set()

    def look(self) -> None:
        """Let trainings go on that have room."""
        for job in self._jobs.waiting_for_room():
            model = self._folder_of(job).parents[1]
            if has_room(model, room_for(model)):
                self._seconds = min(2 * self._seconds, LONGEST_SECONDS_BETWEEN_LOOKS)
                self._jobs.go_on(job)

    def _work(self) -> None:
        while not self._closing.wait(self._seconds):
            try:
                self.look()
            except OSError:
                logger.exception("the room on disk for trainings cannot be determined")


def room_for(folder: Path) -> int:
    """Bytes that a training of a model writes at least, by the weights that there are.

    Args:
        folder: ``model/<preset>``.
    """
    sizes = [path.stat().st_size for path in (*folder.glob("*.pt"), *folder.glob("*/*.pt"))]
    return max(LEAST_ROOM_BYTES, TIMES_THE_LARGEST * max(sizes, default=0))
