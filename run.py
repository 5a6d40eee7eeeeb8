#!/usr/bin/env python3
"""Install and start everything with one command: ``python3 run.py``.

    run.py [serve]   make .venv, install, make sample studies, start the server and say what to do next
    run.py setup     make .venv and install, no more
    run.py test      install the test tools too, then run ruff, mypy and pytest
    run.py doctor    say what works on this machine and what to do about the rest

Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
APP = ROOT / "apps" / "unetr_radiology"
SAMPLE_STUDIES = ROOT / "studies" / "sample"
SAMPLE_COUNTS = {"hippocampus": 8, "torso": 2}
"""Synthetic studies of each kind, as NIfTI files and as DICOM series."""

SUPPORTED_PYTHONS = ((3, 11), (3, 12), (3, 10))
"""In the order in which they are looked for."""
COMMANDS = ("serve", "setup", "test", "doctor")
DEFAULT_MODELS = "hippocampus_mr,abdomen_ct"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
WINDOWS = os.name == "nt"
NEEDED_DISK_GB = 12 if sys.platform == "linux" else 6
"""On Linux the published torch is a CUDA build of several GB, and pip keeps what it downloads too."""

# A test computes on one thread. Files in their own order: by default those of a few long tests would come last.
TEST_PROCESSES = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]

SERVER_ENVIRONMENT = {
    # MLflow no longer takes the file store that MONAI Label writes to: every training would end in an error
    "MONAI_LABEL_TRACKING_ENABLED": "false",
    # it starts a process that scores all images at each start, next sample and training
    "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    "MONAI_LABEL_DATASTORE_FILE_EXT": '["*.nii.gz","*.nii","*.nrrd"]',
    # threads that wait for each other let go of the core; where another program computes too, each of a network's
    # hundreds of operations would otherwise wait for a scheduler's turn
    "OMP_WAIT_POLICY": "passive",
}
PASSED_ON_OPTIONS = ("ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs", "root_path", "log_config")
SECONDS_TO_STOP = 15.0
SECONDS_TO_STOP_CHILDREN = 5.0

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
"""What pip prints, and the sentence that it comes to; the first that fits is used."""


class RunError(Exception):
    """Something that ends the program with one sentence for the user and this exit code."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        rerun_code = run_with_supported_python(given)
        if rerun_code is not None:
            return rerun_code
        options = parse_arguments(given)
        command: Callable[[argparse.Namespace], int] = options.run
        return command(options)
    except RunError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\nrun.py: stopped", file=sys.stderr)
        return 130


def interrupt(*_: object) -> NoReturn:
    """Let SIGTERM end this program as Ctrl-C does, so that what it started ends too."""
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------- the command line


def parse_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; ``serve`` is the command where none is named, and what follows ``--`` is kept."""
    own, extra = split_at_double_dash(given)
    if not own or (own[0] not in COMMANDS and own[0] not in ("-h", "--help")):
        own = ["serve", *own]
    options = build_parser().parse_args(own)
    options.extra = extra
    if extra and own[0] != "test":
        raise RunError(f"only 'test' passes arguments after -- on (to pytest); given: {' '.join(extra)}", 2)
    return options


def split_at_double_dash(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first ``--`` and what stands after it."""
    if "--" not in given:
        return list(given), []
    at = list(given).index("--")
    return list(given[:at]), list(given[at + 1 :])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="run.py", description="UNETR for MONAI Label: install, start, test, check.")
    commands = parser.add_subparsers(required=True)
    _add_serve(commands)
    setup = commands.add_parser("setup", help="make .venv and install, no more")
    setup.add_argument("--dev", action="store_true", help="the test tools too")
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


# ---------------------------------------------------------------------------------------------- which Python


def run_with_supported_python(given: Sequence[str]) -> int | None:
    """Start over with a supported Python when this one is not; None when this one is.

    Raises:
        RunError: when there is no supported Python on this machine.
    """
    if sys.version_info[:2] in SUPPORTED_PYTHONS:
        return None
    for candidate in candidate_pythons():
        if python_version(candidate) in SUPPORTED_PYTHONS:
            return become([*candidate, str(ROOT / "run.py"), *given])
    raise RunError(
        f"Python {sys.version_info[0]}.{sys.version_info[1]} is not supported and no other was found; "
        "valid: Python 3.10, 3.11 or 3.12 (install Python 3.11, then start again with python3.11 run.py)",
        3,
    )


def become(command: Sequence[str]) -> int:
    """Go on as another program; returns its exit code where a process cannot be replaced."""
    if not WINDOWS:
        os.execvp(command[0], list(command))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one cleans up
    return subprocess.call(command)


def candidate_pythons() -> Iterator[list[str]]:
    """Commands that may start a supported Python, the best first."""
    for major, minor in SUPPORTED_PYTHONS:
        found = shutil.which(f"python{major}.{minor}")
        if found:
            yield [found]
    if WINDOWS and shutil.which("py"):
        for major, minor in SUPPORTED_PYTHONS:
            yield ["py", f"-{major}.{minor}"]


def python_version(command: Sequence[str]) -> tuple[int, int] | None:
    """Version of the Python that a command starts; None when it starts none, as a version manager's stub."""
    try:
        answer = subprocess.run(
            [*command, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, timeout=30
        )
        major, minor = answer.stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


# ---------------------------------------------------------------------------------------------- installing


def run_setup(options: argparse.Namespace) -> int:
    """``run.py setup``."""
    set_up(dev=options.dev)
    print(f"ready: {VENV}")
    return 0


def set_up(dev: bool) -> Path:
    """Make ``.venv`` and install what is missing; returns its Python. Does nothing when all is in place.

    Raises:
        RunError: when it cannot be made or the install fails.
    """
    python = venv_python()
    version = python_version([str(python)])
    if version not in SUPPORTED_PYTHONS:
        make_venv()
        version = python_version([str(python)])
    kind = "dev" if dev else "base"
    if read_stamp().get(kind) == requirements_digest(dev, version):
        return python
    if subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode != 0:
        make_venv()  # the making of this one was interrupted
    install(python, dev)
    # An install with the test tools is an install without them too. Written last: no stamp, no finished install.
    kinds = {"base": False, "dev": True} if dev else {"base": False}
    write_stamp({name: requirements_digest(with_tools, version) for name, with_tools in kinds.items()})
    return python


def venv_python() -> Path:
    """Path of the virtual environment's Python, whether it exists or not."""
    return VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")


def make_venv() -> None:
    """Make the virtual environment anew."""
    print(f"making a virtual environment with Python {sys.version.split()[0]} in {VENV}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode != 0:
        if "ensurepip" in made.stdout + made.stderr:
            raise RunError("this Python comes without venv; on Debian and Ubuntu: sudo apt install python3-venv")
        reason = (made.stderr or made.stdout).strip().splitlines()
        raise RunError(f"{VENV} cannot be made: {reason[-1] if reason else 'no reason given'}")


def requirements_files(dev: bool) -> list[Path]:
    """The files that decide what is installed."""
    names = ["requirements.txt", "constraints.txt"] + (["requirements-dev.txt"] if dev else [])
    return [ROOT / name for name in names]


def requirements_digest(dev: bool, version: tuple[int, int] | None) -> str:
    """SHA-256 over what is to be installed and the Python that it is installed for."""
    digest = hashlib.sha256(repr(version).encode())
    for path in requirements_files(dev):
        # line ends differ by how git checked the file out, which is no reason to install anew
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def stamp_path() -> Path:
    """The file that says what the last finished install installed."""
    return VENV / "installed.json"


def read_stamp() -> dict[str, str]:
    """What the last finished install installed; empty when none has finished."""
    try:
        data = json.loads(stamp_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_stamp(digests: Mapping[str, str]) -> None:
    """Record a finished install, at once or not at all."""
    partial = stamp_path().with_suffix(".partial")
    partial.write_text(json.dumps(dict(digests)), encoding="utf-8")
    os.replace(partial, stamp_path())


def install(python: Path, dev: bool) -> None:
    """Install the requirements into the virtual environment, showing progress.

    Raises:
        RunError: with a sentence that says what to do.
    """
    unfinished = VENV / "installing"
    if unfinished.exists():
        print("the last install did not finish; going on with it")
    stamp_path().unlink(missing_ok=True)
    unfinished.touch()
    warn_if_disk_is_short()
    started = time.monotonic()
    constraints = str(ROOT / "constraints.txt")
    wanted = str(ROOT / ("requirements-dev.txt" if dev else "requirements.txt"))
    # sam2 is published as source, and a build in a clean room would download torch a second time: so torch comes
    # first, and sam2 is built beside it.
    for title, arguments in (
        ("1/3 PyTorch", ["setuptools", "torch", "numpy"]),
        ("2/3 SAM 2, from source", ["--no-build-isolation", "--no-deps", "sam2"]),
        ("3/3 everything else", ["-r", wanted]),
    ):
        pip_install(python, title, ["-c", constraints, *arguments])
    unfinished.unlink()
    print(f"installed in {duration(time.monotonic() - started)}", flush=True)


def warn_if_disk_is_short() -> None:
    """Say so before an install that will probably fill the disk."""
    free_gb = shutil.disk_usage(VENV).free / 1e9
    if free_gb < NEEDED_DISK_GB:
        print(f"warning: {free_gb:.1f} GB are free here; the install needs up to {NEEDED_DISK_GB} GB", flush=True)


def pip_install(python: Path, title: str, arguments: Sequence[str]) -> None:
    """Run one ``pip install``: its words go to the log, its progress to the terminal.

    Raises:
        RunError: when pip fails.
    """
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", *arguments]
    environment = {**os.environ, "SAM2_BUILD_CUDA": "0", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    log_path = VENV / "install.log"
    with log_path.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {subprocess.list2cmdline(command)}\n")
        start = log.tell()
        with InstallProgress(title) as progress, started(command, env=environment) as process:
            for line in process.stdout or ():
                log.write(line)
                progress.read(line)
    if process.returncode != 0:
        with log_path.open(encoding="utf-8") as log:
            log.seek(start)
            raise RunError(f"the install failed: {explain_failure(log.read())} (pip's own words: {log_path})")


@contextlib.contextmanager
def started(command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process whose output can be read line by line; it does not outlive this program's interruption."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def explain_failure(log: str) -> str:
    """The sentence for what pip printed."""
    for pattern, sentence in FAILURES:
        if re.search(pattern, log, re.IGNORECASE):
            return sentence
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR:")]
    return f"{errors[-1] if errors else 'pip gave no reason'}; delete the folder .venv and start again"


class InstallProgress:
    """One line that says how far an install is: what it works on, how many packages, how long.

    On a terminal the line is rewritten every second; elsewhere (a log file) a new one comes every ten seconds.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._found = 0
        self._doing = "starting"
        self._unpacking: tuple[int, int] | None = None  # how many lay there before, how many are to come
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
        """Take in one line of pip's."""
        words = line.split()
        if line.startswith(("Collecting ", "Processing ")):
            self._found += 1
            self._doing = f"looking at {short_name(words[1])}"
        elif line.lstrip().startswith("Downloading "):
            self._doing = f"downloading {' '.join(words[1:])[-60:]}"
        elif line.startswith("Building wheel"):
            self._doing = "building " + " ".join(words[3:4] or words[-1:])
        elif line.startswith("Installing collected packages:"):
            self._unpacking = count_installed(), len(words) - 3
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
            self._doing = f"unpacking package {min(count_installed() - before + 1, total)} of {total}"
        text = f"{self._title}: {self._found} packages, {elapsed}, {self._doing}"
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="", flush=True)
        else:
            print(text, flush=True)


def short_name(requirement: str) -> str:
    """Name in a requirement or a file: ``scipy==1.17.1`` is ``scipy``, ``/wheels/torch-2.13.0.whl`` is ``torch``."""
    return re.split(r"[^A-Za-z0-9._-]|-[0-9]", re.split(r"[/\\]", requirement)[-1], maxsplit=1)[0]


def count_installed() -> int:
    """How many packages lie in the virtual environment."""
    folders = ("lib/python*/site-packages", "Lib/site-packages")
    return max(sum(1 for _ in VENV.glob(f"{folder}/*.dist-info")) for folder in folders)


def duration(seconds: float) -> str:
    """Minutes and seconds: ``1:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------------------------------------- serving


def run_serve(options: argparse.Namespace) -> int:
    """``run.py serve``: install, make samples, start the server, stay until it ends; returns its exit code."""
    check_port_is_free(options.host, options.port)
    python = set_up(dev=False)
    if options.studies is None:
        make_sample_studies(python)
    if options.host not in LOOPBACK_HOSTS:
        print(
            f"WARNING: {options.host} can be reached from other machines, and this server asks nobody for a password: "
            "whoever reaches it can read and change the studies.",
            flush=True,
        )
    check_port_is_free(options.host, options.port)  # once more: the install may have taken minutes
    return supervise(server_command(python, options), server_environment(), options)


def check_port_is_free(host: str, port: int) -> None:
    """Refuse a port that something listens on already.

    Raises:
        RunError: naming the port.
    """
    if not port_is_free(host, port):
        raise RunError(
            f"port {port} on {host} is in use or not allowed: stop what listens there, or give another, "
            f"for example --port {port + 1}",
            4,
        )


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if not WINDOWS:  # there it would allow a second listener; here it only skips the wait after a stop
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError):
        return False
    return True


def make_sample_studies(python: Path) -> None:
    """Draw the synthetic sample cases, unless they are there.

    Raises:
        RunError: when the generator fails.
    """
    if all(len(list(SAMPLE_STUDIES.glob(kind))) >= sum(SAMPLE_COUNTS.values()) for kind in ("*.nii.gz", "dicom/*")):
        return
    print(f"making {sum(SAMPLE_COUNTS.values())} synthetic sample studies in {SAMPLE_STUDIES}", flush=True)
    for what, count in SAMPLE_COUNTS.items():
        command = [str(python), str(ROOT / "sample-data" / "generate.py"), "--out", str(SAMPLE_STUDIES)]
        command += ["--what", what, "--count", str(count), "--seed", "0", "--format", "both"]
        if subprocess.call(command, env=server_environment()) != 0:
            raise RunError("the sample studies could not be made; give a folder of your own with --studies")


def server_environment() -> dict[str, str]:
    """This process's environment, with what the server needs where the user has not set it."""
    environment = {**SERVER_ENVIRONMENT, **os.environ}
    path = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])
    return environment


def server_command(python: Path, options: argparse.Namespace) -> list[str]:
    """The command that starts MONAI Label's server with this project's app around it; all paths absolute."""
    # not the `monailabel` script: that is a shell script that runs whichever Python is first on the PATH
    command = [str(python), "-m", "monailabel.main", "start_server", "--app", str(APP)]
    command += ["--studies", absolute_studies(options.studies), "--host", options.host, "--port", str(options.port)]
    command += ["--uvicorn_app", "lib.server.app:app"]
    for option in PASSED_ON_OPTIONS:
        value = getattr(options, option)
        if value is not None:
            command += [f"--{option}", value]
    for key, value in app_settings(options):
        command += ["--conf", key, value]
    return command


def absolute_studies(studies: str | None) -> str:
    """The studies as the server is told: a URL as it is, a folder by its full path."""
    if studies is None:
        return str(SAMPLE_STUDIES)
    if studies.startswith(("http://", "https://")):
        return studies
    return str(Path(studies).expanduser().resolve())


def app_settings(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The ``--conf`` pairs; ``--models`` stands before a ``--conf models``, and the default behind both."""
    pairs = [(key, value) for key, value in options.conf if not (key == "models" and options.models)]
    if options.models:
        return [("models", options.models), *pairs]
    # a preset of the user's own is what shall be served, unless told otherwise
    if {"models", "preset"} & {key for key, _ in pairs}:
        return pairs
    return [("models", DEFAULT_MODELS), *pairs]


def supervise(command: Sequence[str], environment: Mapping[str, str], options: argparse.Namespace) -> int:
    """Run the server until it ends or this process is told to stop; returns the exit code."""
    # the server stops when its standard input ends: when this program is gone, by whatever signal
    told = {**environment, "UNETR_ENDS_WITH_INPUT": "1"}
    server = subprocess.Popen(command, env=told, stdin=subprocess.PIPE, **own_process_group())
    stopped = threading.Event()
    with stop_requests_set(stopped):
        if wait_until_ready(server, options, stopped):
            print(next_steps(options), flush=True)
        while not stopped.is_set() and server.poll() is None:
            stopped.wait(0.2)
        if stopped.is_set():
            print("stopping the server", flush=True)
        code = stop_tree(server)
    if server.stdin is not None:
        server.stdin.close()
    ended_as_told = stopped.is_set() and (WINDOWS or code in (0, -signal.SIGTERM, -signal.SIGINT))
    return 0 if ended_as_told else as_exit_code(code)


def own_process_group() -> dict[str, Any]:
    """Arguments of Popen that put the server and its children where one signal reaches them all."""
    if WINDOWS:
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


@contextlib.contextmanager
def stop_requests_set(stopped: threading.Event) -> Iterator[None]:
    """While this lasts, Ctrl-C and SIGTERM set ``stopped`` in place of what they usually do."""
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    if not WINDOWS and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored by nohup, which means it
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until_ready(server: subprocess.Popen[bytes], options: argparse.Namespace, stopped: threading.Event) -> bool:
    """Wait until the server answers; False when it ends first or this process is told to stop."""
    started = time.monotonic()
    said = 0
    while server.poll() is None and not stopped.is_set():
        if answers(server_url(options) + "/info/"):
            return True
        stopped.wait(0.5)
        waited = time.monotonic() - started
        if waited >= said + 15:
            said += 15
            print(f"the server is starting ({waited:.0f} s)", flush=True)
    if not stopped.is_set():
        print("run.py: the server ended while it started; the reason stands above", file=sys.stderr)
    return False


def answers(url: str) -> bool:
    """Whether a server answers there, in whatever way."""
    context = ssl.create_default_context()
    context.check_hostname = False  # it is this machine's own server, most often with a self-signed certificate
    context.verify_mode = ssl.CERT_NONE
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
    try:
        urllib.request.build_opener(*handlers).open(url, timeout=30).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False
    return True


def server_url(options: argparse.Namespace) -> str:
    """Where a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    scheme = "https" if options.ssl_keyfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.port}"


def next_steps(options: argparse.Namespace) -> str:
    """Five lines: what to do now in 3D Slicer and in OHIF."""
    url = server_url(options)
    return "\n".join(
        (
            f"Ready at {url} - stop with Ctrl-C.",
            "3D Slicer:  in View > Extensions Manager install MONAILabel, restart, open Active Learning > MONAI Label,",
            f"            enter {url} as MONAI Label server, and press the green refresh arrow;",
            "            press Next Sample to load a case, then Run under Auto Segmentation.",
            f"OHIF:       open {url}/ohif/ in a browser, choose a study and MONAI Label; Run, correct, Submit.",
        )
    )


def stop_tree(server: subprocess.Popen[bytes]) -> int:
    """End the server and every process that it started (a training too); returns the server's exit code."""
    if WINDOWS:
        return _stop_tree_on_windows(server)
    _signal_group(server.pid, signal.SIGTERM)
    try:
        code = server.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        server.kill()
        code = server.wait()
    deadline = time.monotonic() + SECONDS_TO_STOP_CHILDREN
    while _signal_group(server.pid, 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal_group(server.pid, signal.SIGKILL if not WINDOWS else signal.SIGTERM)
    return code


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; False when nobody is left in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _stop_tree_on_windows(server: subprocess.Popen[bytes]) -> int:
    if server.poll() is None:
        server.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
        with contextlib.suppress(subprocess.TimeoutExpired):
            return server.wait(SECONDS_TO_STOP)
    subprocess.run(["taskkill", "/T", "/F", "/PID", str(server.pid)], capture_output=True)
    return server.wait()


def as_exit_code(code: int) -> int:
    """A process's return code as a shell would show it: death by signal N is 128 + N."""
    return 128 - code if code < 0 else code


# ---------------------------------------------------------------------------------------------- testing


def run_tests(options: argparse.Namespace) -> int:
    """``run.py test``: every check runs, whatever the ones before it said."""
    python = str(set_up(dev=True))
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
        codes[name], closing_line = run_and_keep_last_line(command)
    print("\n== summary")
    for name, code in codes.items():
        print(f"{'ok  ' if code == 0 else 'FAIL'}  {name}" + (f" (exit code {code})" if code else ""))
    print(closing_line, flush=True)
    return 0 if not any(codes.values()) else 1


def run_and_keep_last_line(command: Sequence[str]) -> tuple[int, str]:
    """Run a check from the project's folder, showing what it prints; returns its exit code and its last line."""
    last = ""
    waiting = {"OMP_WAIT_POLICY": SERVER_ENVIRONMENT["OMP_WAIT_POLICY"]}
    environment = {**waiting, **os.environ, "PYTHONUNBUFFERED": "1"}
    with started(command, cwd=ROOT, env=environment) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.rstrip() or last
    return process.returncode, last


# ---------------------------------------------------------------------------------------------- doctor


def run_doctor(options: argparse.Namespace) -> int:
    """``run.py doctor``: what can be seen from outside, then what the installed environment says of itself."""
    python = venv_python()
    version = python_version([str(python)])
    findings = [doctor_python(), doctor_venv(version), doctor_port(options.host, options.port)]
    for state, text in findings:
        print(f"{state:<5} {text}", flush=True)
    code = 0
    if version in SUPPORTED_PYTHONS:
        asked = ["--plan", options.plan] if options.plan else []
        asked += ["--image", str(options.image)] if options.image else []
        asked += ["--train"] if options.train else []
        asked += ["--studies", str(options.studies)] if options.studies else []
        asked += ["--models", options.models] if options.models else []
        asked += ["--preset", str(options.preset)] if options.preset else []
        asked += ["--memory-budget", options.memory_budget] if options.memory_budget else []
        code = subprocess.call([str(python), "-m", "lib.doctor", *asked], env=server_environment())
    return 1 if code or any(state == "FAIL" for state, _ in findings) else 0


def doctor_python() -> tuple[str, str]:
    """This Python."""
    return "ok", f"Python {sys.version.split()[0]} ({sys.executable})"


def doctor_venv(version: tuple[int, int] | None) -> tuple[str, str]:
    """Whether the virtual environment is there and holds what the requirements ask for today."""
    if version is None:
        free_gb = shutil.disk_usage(ROOT).free / 1e9
        return "warn", f"no virtual environment yet; {free_gb:.0f} GB free: python3 run.py makes it"
    if read_stamp().get("base") != requirements_digest(False, version):
        return "warn", ".venv is not up to date with requirements.txt: python3 run.py setup installs what is missing"
    return "ok", f".venv is up to date (Python {version[0]}.{version[1]})"


def doctor_port(host: str, port: int) -> tuple[str, str]:
    """Whether the server's port is free."""
    if port_is_free(host, port):
        return "ok", f"port {port} on {host} is free"
    return "warn", f"port {port} on {host} is in use (a server that runs already?): or give another with --port"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
