"""Progress of an installation."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from pathlib import Path


class InstallProgress:
    """One line with the progress of an installation: current step, number of packages, elapsed time.

    On a terminal the line is rewritten every second; otherwise (in a log file) a new line is printed every ten seconds.
    """

    def __init__(self, title: str, venv: Path) -> None:
        self._title = title
        self._venv = venv
        self._found = 0
        self._doing = "starting"
        self._unpacking: tuple[int, int] | None = None  # packages before, packages to install
        self._started = time.monotonic()
        self._seconds_between = 1.0 if sys.stdout.isatty() else 10.0
        self._finished = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> InstallProgress:
        self._show()
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._ticker.join()
        self._show()
        if sys.stdout.isatty():
            print(flush=True)

    def read(self, line: str) -> None:
        """Process one line of pip's output."""
        words = line.split()
        if line.startswith(("Collecting ", "Processing ")):
            self._found += 1
            self._doing = f"looking at {short_name(words[1])}"
        elif line.lstrip().startswith("Downloading "):
            self._doing = f"downloading {' '.join(words[1:])[-60:]}"
        elif line.startswith("Building wheel"):
            self._doing = "building " + " ".join(words[3:4] or words[-1:])
        elif line.startswith("Installing collected packages:"):
            self._unpacking = count_installed(self._venv), len(words) - 3
        elif line.startswith("Successfully installed"):
            self._unpacking = None
            self._doing = f"{len(words) - 2} packages installed"
        elif line.startswith("ERROR:"):
            self._unpacking = None
            self._doing = "failed"

    def _tick(self) -> None:
        while not self._finished.wait(self._seconds_between):
            self._show()

    def _show(self) -> None:
        elapsed = duration(time.monotonic() - self._started)
        if self._unpacking:
            before, total = self._unpacking
            self._doing = f"unpacking package {min(count_installed(self._venv) - before + 1, total)} of {total}"
        text = f"{self._title}: {self._found} packages, {elapsed}, {self._doing}"
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="", flush=True)
        else:
            print(text, flush=True)


def short_name(requirement: str) -> str:
    """The name in a requirement or a file: ``scipy`` for ``scipy==1.17.1``, ``torch`` for ``/w/torch-2.13.0.whl``."""
    return re.split(r"[^A-Za-z0-9._-]|-[0-9]", re.split(r"[/\\]", requirement)[-1], maxsplit=1)[0]


def count_installed(venv: Path) -> int:
    """Number of installed packages in a virtual environment."""
    folders = ("lib/python*/site-packages", "Lib/site-packages")
    return max(sum(1 for _ in venv.glob(f"{folder}/*.dist-info")) for folder in folders)


def duration(seconds: float) -> str:
    """Minutes and seconds: ``1:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
