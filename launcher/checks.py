"""The checks of continuous integration: ruff, mypy and pytest."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.environment import set_up
from launcher.processes import started
from launcher.project import SERVER_ENVIRONMENT, Project

SHARED_MEMORY = Path("/dev/shm")
# Free memory from which on the tests' files are put there.
BYTES_FOR_FILES = 8 * 2**30
MOST_TEST_PROCESSES = 4


def count_test_processes(cores: int) -> int:
    """Number of test processes: three for two cores, since tests wait for servers and browsers half of the time."""
    return max(1, min(MOST_TEST_PROCESSES, 3 * cores // 2))


# A test computes on one thread. Test files keep their order: by default, files with a few long tests would come last.
TEST_PROCESSES = ["-n", str(count_test_processes(os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]


def run_tests(project: Project, options: argparse.Namespace) -> int:
    """``run.py test``: run every check, whatever the results of the others."""
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
    with files_in_memory() as environment:
        for name, command in checks.items():
            print(f"\n== {name}", flush=True)
            codes[name], closing_line = run_and_keep_last_line(project, command, environment)
    print("\n== summary")
    for name, code in codes.items():
        print(f"{'ok  ' if code == 0 else 'FAIL'}  {name}" + (f" (exit code {code})" if code else ""))
    print(closing_line, flush=True)
    return 0 if not any(codes.values()) else 1


@contextlib.contextmanager
def files_in_memory(folder: Path = SHARED_MEMORY, needed: int = BYTES_FOR_FILES) -> Iterator[dict[str, str]]:
    """Environment variables that make pytest use files in memory, if Linux has enough of it.

    The tests write thousands of synced files, each of which takes about 20 ms on a disk.
    """
    if not folder.is_dir() or shutil.disk_usage(folder).free < needed:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="unetr-tests-", dir=folder, ignore_cleanup_errors=True) as root:
        yield {"PYTEST_DEBUG_TEMPROOT": root}


def run_and_keep_last_line(
    project: Project, command: Sequence[str], variables: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a check in the project's folder and print its output; returns its exit code and its last line.

    Args:
        project: its folder.
        command: the check.
        variables: environment variables of the check, unless they are set already.
    """
    last = ""
    threads = {"OMP_WAIT_POLICY": SERVER_ENVIRONMENT["OMP_WAIT_POLICY"], "OMP_NUM_THREADS": "1"}
    environment = {**threads, **(variables or {}), **os.environ, "PYTHONUNBUFFERED": "1"}
    with started(command, cwd=project.root, env=environment) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.rstrip() or last
    return process.returncode, last
