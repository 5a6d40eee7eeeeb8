"""Installs the requirements with pip, and explains its failures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import RunError
from launcher.processes import started
from launcher.progress import InstallProgress, duration
from launcher.project import Project

NEEDED_DISK_GB = 12 if sys.platform == "linux" else 6
"""Disk space for the installation: on Linux the published torch is a CUDA build of several GB, which pip also
caches.
"""

FAILURES: tuple[tuple[str, str], ...] = (
    (
        r"No space left on device|Errno 28|not enough space on the disk",
        f"the disk is full: free up to {NEEDED_DISK_GB} GB where this folder lies, and start again",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError|SSL: ",
        "the package index's certificate was refused, as behind a company proxy: give pip your certificates "
        "(environment variable PIP_CERT), and start again",
    ),
    (
        r"name resolution|NewConnectionError|ConnectionError|Connection refused|Network is unreachable|getaddrinfo|"
        r"ConnectTimeout|ReadTimeout|timed out|ProxyError|Name or service not known|Could not fetch URL|IncompleteRead",
        "the package index cannot be reached: check the network (behind a proxy, set HTTPS_PROXY), and start again; "
        "what is downloaded already is kept",
    ),
    (
        r"Permission denied|PermissionError|Access is denied|WinError 5",
        "a file cannot be written: close programs that use .venv, check who owns this folder, and start again",
    ),
    (
        r"No matching distribution found|Could not find a version",
        "a package has no release for this machine: Python 3.10 to 3.12, 64-bit, is needed, on Linux with glibc 2.28 "
        "or newer, Windows, or macOS 14 or newer on Apple silicon",
    ),
    (
        r"error: command '.*' failed|Failed building wheel|subprocess-exited-with-error",
        "a package could not be built: install a C++ compiler and Python's headers, and start again",
    ),
)
"""Patterns in pip's output, and the explanation of each; the first match is used."""


def install(project: Project, requirements: Path) -> None:
    """Install a requirements file into the virtual environment, with a progress display.

    Raises:
        RunError: with a sentence that states what to do.
    """
    unfinished = project.venv / "installing"
    if unfinished.exists():
        print("the last install did not finish; going on with it")
    project.stamp.unlink(missing_ok=True)
    unfinished.touch()
    warn_if_disk_is_short(project)
    started = time.monotonic()
    constraints = str(project.root / "constraints.txt")
    # sam2 is published as source only, and an isolated build would download torch a second time, so torch is installed
    # first and sam2 is built without isolation.
    for title, arguments in (
        ("1/3 PyTorch", ["setuptools", "torch", "numpy"]),
        ("2/3 SAM 2, from source", ["--no-build-isolation", "--no-deps", "sam2"]),
        ("3/3 everything else", ["-r", str(requirements)]),
    ):
        pip_install(project, title, ["-c", constraints, *arguments])
    unfinished.unlink()
    print(f"installed in {duration(time.monotonic() - started)}", flush=True)


def warn_if_disk_is_short(project: Project) -> None:
    """Print a warning before an installation that will probably fill the disk."""
    free_gb = shutil.disk_usage(project.venv).free / 1e9
    if free_gb < NEEDED_DISK_GB:
        print(f"warning: {free_gb:.1f} GB are free here; the install needs up to {NEEDED_DISK_GB} GB", flush=True)


def pip_install(project: Project, title: str, arguments: Sequence[str]) -> None:
    """Run one ``pip install``: its output goes to the log, its progress to the terminal.

    Raises:
        RunError: if pip fails.
    """
    command = [str(project.python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", *arguments]
    environment = {**os.environ, "SAM2_BUILD_CUDA": "0", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    log_path = project.venv / "install.log"
    with log_path.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {subprocess.list2cmdline(command)}\n")
        start = log.tell()
        with InstallProgress(title, project.venv) as progress, started(command, env=environment) as process:
            for line in process.stdout or ():
                log.write(line)
                progress.read(line)
    if process.returncode != 0:
        with log_path.open(encoding="utf-8") as log:
            log.seek(start)
            raise RunError(f"the install failed: {explain_failure(log.read())} (pip's own words: {log_path})")


def explain_failure(log: str) -> str:
    """The explanation of a failure in pip's output."""
    for pattern, sentence in FAILURES:
        if re.search(pattern, log, re.IGNORECASE):
            return sentence
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR:")]
    return f"{errors[-1] if errors else 'pip gave no reason'}; delete the folder .venv and start again"
