"""Creates the virtual environment, and keeps it up to date."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import RunError
from launcher.install import install
from launcher.project import Project
from launcher.pythons import SUPPORTED_PYTHONS, python_version


def run_setup(project: Project, options: argparse.Namespace) -> int:
    """``run.py setup``."""
    set_up(project, dev=options.dev)
    if options.cluster:
        set_up(project, dev=False, cluster=True)
    print(f"ready: {project.venv}")
    return 0


def set_up(project: Project, dev: bool, cluster: bool = False) -> Path:
    """Create ``.venv`` and install what is missing; returns its Python. It does nothing if all is up to date.

    Raises:
        RunError: if it cannot be created or if the installation fails.
    """
    python = project.python
    version = python_version([str(python)])
    if version not in SUPPORTED_PYTHONS:
        make_venv(project)
        version = python_version([str(python)])
    kind = "cluster" if cluster else "dev" if dev else "base"
    before = read_stamp(project)
    if before.get(kind) == requirements_digest(project, kind, version):
        return python
    if subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode != 0:
        make_venv(project)  # the creation of this one was interrupted
    install(project, requirements_files(project, kind)[-1])
    # A larger installation includes the smaller ones, and removes nothing. The stamp is written last: without it, the
    # installation is unfinished.
    write_stamp(project, before | {name: requirements_digest(project, name, version) for name in {"base", kind}})
    return python


def make_venv(project: Project) -> None:
    """Create the virtual environment, replacing an existing one."""
    print(f"making a virtual environment with Python {sys.version.split()[0]} in {project.venv}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(project.venv)], capture_output=True, text=True)
    if made.returncode != 0:
        if "ensurepip" in made.stdout + made.stderr:
            raise RunError("this Python comes without venv; on Debian and Ubuntu: sudo apt install python3-venv")
        reason = (made.stderr or made.stdout).strip().splitlines()
        raise RunError(f"{project.venv} cannot be made: {reason[-1] if reason else 'no reason given'}")


def requirements_files(project: Project, kind: str) -> list[Path]:
    """The files that determine what is installed; the last of them is passed to pip.

    Args:
        project: the checkout.
        kind: ``base``, ``dev`` (with the test tools) or ``cluster`` (with Ray, for many machines).
    """
    names = ["constraints.txt", "requirements.txt"] + ([] if kind == "base" else [f"requirements-{kind}.txt"])
    return [project.root / name for name in names]


def requirements_digest(project: Project, kind: str, version: tuple[int, int] | None) -> str:
    """SHA-256 of the requirements and of the Python version for which they are installed."""
    digest = hashlib.sha256(repr(version).encode())
    for path in requirements_files(project, kind):
        # line ends depend on git's settings, and must not cause a new installation
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def read_stamp(project: Project) -> dict[str, str]:
    """The requirements of the last finished installation; empty if there is none."""
    try:
        data = json.loads(project.stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_stamp(project: Project, digests: Mapping[str, str]) -> None:
    """Record a finished installation atomically."""
    partial = project.stamp.with_suffix(".partial")
    partial.write_text(json.dumps(dict(digests)), encoding="utf-8")
    os.replace(partial, project.stamp)
