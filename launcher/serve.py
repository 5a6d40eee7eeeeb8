"""Installs and starts the server."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from launcher.environment import set_up
from launcher.errors import RunError
from launcher.ports import check_port_is_free
from launcher.project import Project, server_environment
from launcher.supervise import supervise

SAMPLE_COUNTS = {"hippocampus": 8, "abdomen": 2}
"""Number of synthetic studies of each kind, as NIfTI files and as DICOM series."""

DEFAULT_MODELS = "hippocampus_mr,abdomen_ct"

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

PASSED_ON_OPTIONS = ("ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs", "root_path", "log_config")

FILE_OPTIONS = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "log_config")


def run_serve(project: Project, options: argparse.Namespace) -> int:
    """``run.py serve``: install, create samples, start the server and wait for its end; returns its exit code."""
    check_files(options)
    check_port_is_free(options.host, options.port)
    python = set_up(project, dev=False)
    if options.studies is None:
        make_sample_studies(project, python)
    if options.host not in LOOPBACK_HOSTS:
        print(
            f"WARNING: {options.host} can be reached from other machines, and this server asks nobody for a password: "
            "whoever reaches it can read and change the studies.",
            flush=True,
        )
    check_port_is_free(options.host, options.port)  # once more: the install may have taken minutes
    return supervise(server_command(project, options), server_environment(project), options)


def check_files(options: argparse.Namespace) -> None:
    """Refuse a missing file of the command line by name, which the server itself would not state.

    Raises:
        RunError: naming the option.
    """
    for option in FILE_OPTIONS:
        value = getattr(options, option)
        if value is not None and not Path(value).is_file():
            raise RunError(f"--{option}: there is no file {value!r}", 2)


def make_sample_studies(project: Project, python: Path) -> None:
    """Generate the synthetic sample cases, unless they exist.

    Raises:
        RunError: if the generator fails.
    """
    if all(
        len(list(project.sample_studies.glob(kind))) >= sum(SAMPLE_COUNTS.values()) for kind in ("*.nii.gz", "dicom/*")
    ):
        return
    print(f"making {sum(SAMPLE_COUNTS.values())} synthetic sample studies in {project.sample_studies}", flush=True)
    for what, count in SAMPLE_COUNTS.items():
        command = [str(python), str(project.root / "sample-data" / "generate.py"), "--out", str(project.sample_studies)]
        command += ["--what", what, "--count", str(count), "--seed", "0", "--format", "both"]
        if subprocess.call(command, env=server_environment(project)) != 0:
            raise RunError("the sample studies could not be made; give a folder of your own with --studies")


def server_command(project: Project, options: argparse.Namespace) -> list[str]:
    """The command that starts MONAI Label's server with this project's app; all paths are absolute."""
    # not the `monailabel` script, which is a shell script that runs the first Python on the PATH
    command = [str(project.python), "-m", "lib.server", "start_server", "--app", str(project.app)]
    command += [
        "--studies",
        absolute_studies(project, options.studies),
        "--host",
        options.host,
        "--port",
        str(options.port),
    ]
    command += ["--uvicorn_app", "lib.server.app:app"]
    for option in PASSED_ON_OPTIONS:
        value = getattr(options, option)
        if value is not None:
            command += [f"--{option}", value]
    for key, value in app_settings(options):
        command += ["--conf", key, value]
    return command


def absolute_studies(project: Project, studies: str | None) -> str:
    """The studies for the server: a URL unchanged, a folder as an absolute path."""
    if studies is None:
        return str(project.sample_studies)
    if studies.startswith(("http://", "https://")):
        return studies
    return str(Path(studies).expanduser().resolve())


def app_settings(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The ``--conf`` pairs; ``--models`` overrides ``--conf models``, which overrides the default."""
    pairs = [(key, value) for key, value in options.conf if not (key == "models" and options.models)]
    if options.models:
        return [("models", options.models), *pairs]
    # by default, a user's own preset is served alone
    if {"models", "preset"} & {key for key, _ in pairs}:
        return pairs
    return [("models", DEFAULT_MODELS), *pairs]
