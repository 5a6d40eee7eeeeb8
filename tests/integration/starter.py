"""Start servers as forks of a process in which the libraries are imported already, which is most of a start.

    python -u starter.py SOCKET

Each line of standard input asks for a server, as JSON: ``module``, ``argv``, ``cwd``, ``environment``, ``log``, and
``python`` for what it starts; or, with ``code``, for a program of its own. Each line of the output is a process id,
alone when it is started, with its exit code when it has ended. ``forked_python.py`` asks over the socket, with a
``module`` and its standard streams, and is told the same there. MONAI Label, and what imports it, is imported after the
fork only: it reads the environment when it is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "monai.data", "monai.inferers", "monai.losses", "monai.metrics", "monai.networks.nets", "monai.transforms",
    "nibabel", "SimpleITK", "nrrd", "pydicom", "highdicom", "pydicom_seg", "dicomweb_client", "pynetdicom",
    "scipy.ndimage", "scipy.stats", "PIL.Image", "fastapi", "fastapi.sse", "uvicorn", "requests", "psutil", "yaml",
    "jinja2", "prometheus_client", "filelock", "cachetools", "bcrypt", "cryptography.x509", "diskcache", "dotenv",
    "fastapi_offline", "girder_client", "h11", "jwt", "passlib.context", "passlib.hash", "pydantic_settings",
    "requests_toolbelt", "schedule", "timeloop", "torch.utils.tensorboard", "watchdog.observers",
)  # fmt: skip

# With what they import, most of this project's modules; none of them is one that a process runs.
PROJECT = (
    "lib.activelearning.pool_scoring", "lib.cluster.batch", "lib.datastore.images.sent_series",
    "lib.datastore.label_files.label_folder", "lib.dicom.query", "lib.dicom.remote", "lib.interaction.background",
    "lib.server.http.bodies", "lib.server.http.encryption", "lib.server.pages.cases.slices", "lib.server.work.places",
    "lib.trainers.gathering", "lib.trainers.judging.publishing", "lib.trainers.launch",
)  # fmt: skip

JOBS: dict[int, socket.socket] = {}
"""Processes that were asked for over the socket, and where they are waited for."""

Request = tuple[dict[str, Any], list[int], "socket.socket | None"]
"""What is asked for; its standard streams and who asks, where that comes over the socket."""


def main() -> None:
    """Fork for each request until the input ends; a fork becomes the server."""
    for name in (*LIBRARIES, *PROJECT):
        importlib.import_module(name)
    if "monailabel" in sys.modules:
        raise RuntimeError("MONAI Label is imported before the fork, and has read this process's environment")
    gc.freeze()
    signal.signal(signal.SIGCHLD, tell_ended)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        for request, streams, link in requests(listener):
            # nothing is told to have ended before it has started
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            if (process := os.fork()) == 0:
                become(request, streams)
                return
            if link is None:
                tell(process)
            else:
                JOBS[process] = link
                link.send(str(process).encode())
            for stream in streams:
                os.close(stream)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def requests(listener: socket.socket) -> Iterator[Request]:
    """What is asked for, line by line on standard input and connection by connection, until the input ends."""
    selector, rest = selectors.DefaultSelector(), b""
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                block = os.read(sys.stdin.fileno(), 65536)
                if not block:
                    return
                *lines, rest = (rest + block).split(b"\n")
                yield from ((json.loads(line), [], None) for line in lines)
            elif key.fileobj is listener:
                link, _ = listener.accept()
                text, streams, *_ = socket.recv_fds(link, 2**20, 3)
                selector.register(link, selectors.EVENT_READ)
                yield json.loads(text), streams, link
            else:  # it says nothing more: it has been told the end, or was killed
                selector.unregister(key.fileobj)
                kill_job_of(key.fileobj)


def kill_job_of(link: Any) -> None:
    """End what was started for a connection, whose other end is gone."""
    for process in [process for process, other in list(JOBS.items()) if other is link]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    link.close()


def tell(*numbers: int) -> None:
    """Write a line of the output at once."""
    os.write(1, (" ".join(map(str, numbers)) + "\n").encode())


def tell_ended(*_: object) -> None:
    """Tell of every process that has ended."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not process:
            return
        code, link = os.waitstatus_to_exitcode(status), JOBS.pop(process, None)
        if link is None:
            tell(process, code)
            continue
        with contextlib.suppress(OSError):  # whoever asked was killed
            link.send(str(code).encode())


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Be ``python -m MODULE ARGV``, or ``python -c CODE``."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    if streams:
        for target, source in enumerate(streams):
            os.dup2(source, target)
            os.close(source)
    else:
        with open(os.devnull, "rb") as nothing, open(request["log"], "wb") as log:
            for target, source in ((0, nothing), (1, log), (2, log)):
                os.dup2(source.fileno(), target)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable, sys.path[0] = request.get("python") or sys.executable, str(Path.cwd())
    if code := request.get("code"):
        sys.argv = ["-c"]
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = [request["module"], *request["argv"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
