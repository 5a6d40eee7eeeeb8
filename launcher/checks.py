"""The checks of continuous integration: ruff, mypy and pytest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from launcher.environment import set_up
from launcher.processes import started
from launcher.project import SERVER_ENVIRONMENT, Project

# A test computes on one thread. Files in their own order: by default those of a few long tests would come last.
TEST_PROCESSES = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]


def run_tests(project: Project, options: argparse.Namespace) -> int:
    """``run.py test``: every check runs, whatever the ones before it said."""
    python = str(set_up(project, dev=True))
    color = ["--color=yes"] if sys.stdout.isatty() else []
    checks = {
        "ruff check": [python, "-m", "ruff", "check", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "mypy": [python, "-m", "mypy"],
        "pytest": [python, "-m", "pytest", *TEST_PROCESSES, *color, *options.extra],
    }
    codes: dict[str, int] = {}
    closing_line = ""
    for name, command in checks.items():
        print(f"\n== {name}", flush=True)
        codes[name], closing_line = run_and_keep_last_line(project, command)
    print("\n== summary")
    for name, code in codes.items():
        print(f"{'ok  ' if code == 0 else 'FAIL'}  {name}" + (f" (exit code {code})" if code else ""))
    print(closing_line, flush=True)
    return 0 if not any(codes.values()) else 1


def run_and_keep_last_line(project: Project, command: Sequence[str]) -> tuple[int, str]:
    """Run a check from the project's folder, showing what it prints; returns its exit code and its last line."""
    last = ""
    waiting = {"OMP_WAIT_POLICY": SERVER_ENVIRONMENT["OMP_WAIT_POLICY"]}
    environment = {**waiting, **os.environ, "PYTHONUNBUFFERED": "1"}
    with started(command, cwd=project.root, env=environment) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.rstrip() or last
    return process.returncode, last
