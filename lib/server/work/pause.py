"""Asks a training on the same GPU to pause while requests are answered on it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS_BETWEEN_TOUCHES = 1.0


class Pause:
    """Keeps the timestamp of a file current while requests need a GPU, so that trainings pause."""

    def __init__(self) -> None:
        self.file = Path(tempfile.gettempdir()) / f"unetr-pause-{os.getpid()}"
        self._groups: dict[Path, frozenset[str]] = {}
        self._asked: Counter[str] = Counter()
        self._fresh: set[Path] = set()
        self._lock = threading.Lock()
        self._nobody = threading.Event()
        self._nobody.set()

    def file_for(self, devices: frozenset[str]) -> Path:
        """The file for a training on these GPUs; ``file`` is for a training that may use any."""
        indices = "-".join(sorted(device.removeprefix("cuda:") for device in devices))
        path = self.file.with_name(f"{self.file.name}-{indices}")
        with self._lock:
            self._groups[path] = devices
        return path

    @contextmanager
    def asked(self, device: str) -> Iterator[None]:
        """Claim the device within the block; on a CPU, process priorities do this."""
        if not device.startswith("cuda"):
            yield
            return
        self._change(device, 1)
        try:
            yield
        finally:
            self._change(device, -1)

    def _change(self, device: str, by: int) -> None:
        with self._lock:
            self._asked[device] += by
            began = bool(+self._asked) and self._nobody.is_set()
            self._touch()
            if began:
                self._nobody.clear()
                threading.Thread(target=self._keep_fresh, daemon=True, name="pause").start()
            elif not +self._asked:
                self._nobody.set()

    def _touch(self) -> None:
        asked = set(+self._asked)
        wanted = {path for path, devices in self._groups.items() if devices & asked} | ({self.file} if asked else set())
        for path in self._fresh - wanted:
            path.unlink(missing_ok=True)
        for path in wanted:
            path.touch()
        self._fresh = wanted

    def _keep_fresh(self) -> None:
        """Touch the files for the whole duration of an inference."""
        while not self._nobody.wait(SECONDS_BETWEEN_TOUCHES):
            with self._lock:
                self._touch()
