"""Selects the Python that runs the project."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

from launcher.errors import RunError
from launcher.processes import WINDOWS
from launcher.project import Project

SUPPORTED_PYTHONS = ((3, 11), (3, 12), (3, 10))
"""Supported versions in the order of the search."""


def run_with_supported_python(project: Project, given: Sequence[str]) -> int | None:
    """Restart with a supported Python if this one is not supported; None if it is.

    Raises:
        RunError: if there is no supported Python on this machine.
    """
    if sys.version_info[:2] in SUPPORTED_PYTHONS:
        return None
    for candidate in candidate_pythons():
        if python_version(candidate) in SUPPORTED_PYTHONS:
            return become([*candidate, str(project.root / "run.py"), *given])
    raise RunError(
        f"Python {sys.version_info[0]}.{sys.version_info[1]} is not supported and no other was found; "
        "valid: Python 3.10, 3.11 or 3.12 (install Python 3.11, then start again with python3.11 run.py)",
        3,
    )


def become(command: Sequence[str]) -> int:
    """Replace this program by another one; where that is not possible, run it and return its exit code."""
    if not WINDOWS:
        os.execvp(command[0], list(command))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one cleans up
    return subprocess.call(command)


def candidate_pythons() -> Iterator[list[str]]:
    """Commands that may start a supported Python, preferred ones first."""
    for major, minor in SUPPORTED_PYTHONS:
        found = shutil.which(f"python{major}.{minor}")
        if found:
            yield [found]
    if WINDOWS and shutil.which("py"):
        for major, minor in SUPPORTED_PYTHONS:
            yield ["py", f"-{major}.{minor}"]


def python_version(command: Sequence[str]) -> tuple[int, int] | None:
    """The Python version that a command starts; None if it starts none, as a version manager's stub."""
    try:
        answer = subprocess.run(
            [*command, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, timeout=30
        )
        major, minor = answer.stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
