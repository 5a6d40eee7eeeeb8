"""Asking a training that computes on the same GPU to stand still while requests wait or are answered."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS_BETWEEN_TOUCHES = 1.0


class Pause:
    """Keeps a file fresh for as long as somebody needs the GPU; trainings look at it (``lib.trainers.pause``)."""

    def __init__(self) -> None:
        self.file = Path(tempfile.gettempdir()) / f"unetr-pause-{os.getpid()}"
        self._count = 0
        self._lock = threading.Lock()
        self._nobody = threading.Event()
        self._nobody.set()

    @contextmanager
    def asked(self, device: str) -> Iterator[None]:
        """Ask for the device while the block runs; on a CPU priorities do that."""
        if not device.startswith("cuda"):
            yield
            return
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        with self._lock:
            self._count += by
            if self._count == 1 and by == 1:
                self._nobody.clear()
                self.file.touch()
                threading.Thread(target=self._keep_fresh, daemon=True, name="pause").start()
            elif self._count == 0:
                self._nobody.set()
                self.file.unlink(missing_ok=True)

    def _keep_fresh(self) -> None:
        """Touch the file as long as an inference takes, however long."""
        while not self._nobody.wait(SECONDS_BETWEEN_TOUCHES):
            with self._lock:
                if self._count:
                    self.file.touch()
