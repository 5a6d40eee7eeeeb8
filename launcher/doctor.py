"""Checks of this machine that do not need the virtual environment."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from launcher.environment import read_stamp, requirements_digest
from launcher.ports import port_is_free
from launcher.project import Project, server_environment
from launcher.pythons import SUPPORTED_PYTHONS, python_version


def run_doctor(project: Project, options: argparse.Namespace) -> int:
    """``run.py doctor``: the checks of this module, then those inside the virtual environment."""
    python = project.python
    version = python_version([str(python)])
    findings = [doctor_python(), doctor_venv(project, version), doctor_port(options.host, options.port)]
    for state, text in findings:
        print(f"{state:<5} {text}", flush=True)
    code = 0
    if version in SUPPORTED_PYTHONS:
        arguments = ["--plan", options.plan] if options.plan else []
        arguments += ["--image", str(options.image)] if options.image else []
        arguments += ["--train"] if options.train else []
        arguments += ["--studies", str(options.studies)] if options.studies else []
        arguments += ["--models", options.models] if options.models else []
        arguments += ["--preset", str(options.preset)] if options.preset else []
        arguments += ["--memory-budget", options.memory_budget] if options.memory_budget else []
        code = subprocess.call([str(python), "-m", "lib.doctor", *arguments], env=server_environment(project))
    return 1 if code or any(state == "FAIL" for state, _ in findings) else 0


def doctor_python() -> tuple[str, str]:
    """The Python version of this program."""
    return "ok", f"Python {sys.version.split()[0]} ({sys.executable})"


def doctor_venv(project: Project, version: tuple[int, int] | None) -> tuple[str, str]:
    """Whether the virtual environment exists and matches the current requirements."""
    if version is None:
        free_gb = shutil.disk_usage(project.root).free / 1e9
        return "warn", f"no virtual environment yet; {free_gb:.0f} GB free: python3 run.py makes it"
    if read_stamp(project).get("base") != requirements_digest(project, "base", version):
        return "warn", ".venv is not up to date with requirements.txt: python3 run.py setup installs what is missing"
    return "ok", f".venv is up to date (Python {version[0]}.{version[1]})"


def doctor_port(host: str, port: int) -> tuple[str, str]:
    """Whether the server's port is free."""
    if port_is_free(host, port):
        return "ok", f"port {port} on {host} is free"
    return "warn", f"port {port} on {host} is in use (a server that runs already?): or give another with --port"
