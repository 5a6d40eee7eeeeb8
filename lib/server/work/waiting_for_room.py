"""Resumes trainings that a full disk has stopped, once there is space again."""

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
"""Space factor, since a run writes its state, which includes the best weights, and a version."""


class WaitingForRoom:
    """Checks at intervals whether stopped trainings have space to resume.

    Args:
        jobs: jobs of the server.
        folder_of: returns a training's folder, ``model/<preset>/runs/<run>``.
        seconds: interval between two checks, doubled each time that a training resumes, since the space may again be
            too small.
    """

    def __init__(self, jobs: Jobs, folder_of: Callable[[Job], Path], seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        self._jobs, self._folder_of, self._seconds = jobs, folder_of, seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="waiting-for-room", daemon=True)

    def start(self) -> None:
        """Start checking."""
        self._thread.start()

    def stop(self) -> None:
        """Stop checking; stopped trainings wait until the next start."""
        self._closing.set()

    def look(self) -> None:
        """Resume the trainings for which there is space."""
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
    """Smallest number of bytes that a training of a model writes, by its existing weights.

    Args:
        folder: ``model/<preset>``.
    """
    sizes = [path.stat().st_size for path in (*folder.glob("*.pt"), *folder.glob("*/*.pt"))]
    return max(LEAST_ROOM_BYTES, TIMES_THE_LARGEST * max(sizes, default=0))
