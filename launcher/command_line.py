"""The command line of ``run.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launcher.checks import run_tests
from launcher.doctor import run_doctor
from launcher.environment import run_setup
from launcher.errors import RunError
from launcher.project import Project
from launcher.pythons import run_with_supported_python
from launcher.segment import add_segment
from launcher.serve import DEFAULT_MODELS, PASSED_ON_OPTIONS, run_serve

COMMANDS = ("serve", "segment", "setup", "test", "doctor")


def main(project: Project, arguments: Sequence[str] | None = None) -> int:
    """Run one command in a project's folder; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        rerun_code = run_with_supported_python(project, given)
        if rerun_code is not None:
            return rerun_code
        options = parse_arguments(given)
        command: Callable[[Project, argparse.Namespace], int] = options.run
        return command(project, options)
    except RunError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\nrun.py: stopped", file=sys.stderr)
        return 130


def interrupt(*_: object) -> NoReturn:
    """Let SIGTERM end this program like Ctrl-C, so that its child processes end too."""
    raise KeyboardInterrupt


def parse_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; ``serve`` is the default command, and arguments after ``--`` are kept."""
    own, extra = split_at_double_dash(given)
    if not own or (own[0] not in COMMANDS and own[0] not in ("-h", "--help")):
        own = ["serve", *own]
    options = build_parser().parse_args(own)
    options.extra = extra
    if extra and own[0] != "test":
        raise RunError(f"only 'test' passes arguments after -- on (to pytest); given: {' '.join(extra)}", 2)
    return options


def split_at_double_dash(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first ``--``, and those after it."""
    if "--" not in given:
        return list(given), []
    at = list(given).index("--")
    return list(given[:at]), list(given[at + 1 :])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="run.py", description="UNETR for MONAI Label: install, start, test, check.")
    commands = parser.add_subparsers(required=True)
    _add_serve(commands)
    add_segment(commands)
    setup = commands.add_parser("setup", help="make .venv and install, no more")
    setup.add_argument("--dev", action="store_true", help="the test tools too")
    setup.add_argument("--cluster", action="store_true", help="Ray too, to segment on many machines")
    setup.set_defaults(run=run_setup)
    test = commands.add_parser("test", help="run ruff, mypy and pytest (what follows -- goes to pytest)")
    test.set_defaults(run=run_tests)
    doctor = commands.add_parser("doctor", help="say what works on this machine")
    doctor.add_argument("--host", default="127.0.0.1", help="address to check the port on")
    doctor.add_argument("--port", type=int, default=8000, help="port that the server is to use")
    doctor.add_argument("--plan", metavar="PRESET", help="say how an image would be segmented, and what it takes")
    doctor.add_argument("--image", type=Path, help="the image to plan for (default: a usual one of the preset's kind)")
    doctor.add_argument(
        "--train", action="store_true", help="with --plan: how a training step would be computed instead"
    )
    doctor.add_argument(
        "--memory-budget", metavar="SIZE", help="plan for this much memory, as 6GiB (default: what is free)"
    )
    doctor.add_argument("--studies", type=Path, help="say what in this folder is no case or label, and why")
    doctor.add_argument("--models", help="with --studies: presets of the labels, a,b or all (default)")
    doctor.add_argument("--preset", type=Path, help="with --studies: a preset of your own")
    doctor.set_defaults(run=run_doctor)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="install and start the server (the default)")
    serve.add_argument("--studies", help="folder of images, or URL of a DICOMweb server; sample studies if not given")
    serve.add_argument("--models", help=f"presets to serve, a,b or all; {DEFAULT_MODELS} if not given")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    serve.add_argument(
        "--conf", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="setting of the app; repeatable"
    )
    for option in PASSED_ON_OPTIONS:
        serve.add_argument(f"--{option}", help="handed on to MONAI Label's server")
    serve.set_defaults(run=run_serve)
