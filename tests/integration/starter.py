"""Start servers as forks of a process in which the libraries are imported already, which is most of a start.

    python -u starter.py SOCKET

Each connection to the socket asks for one process, as JSON with its three standard streams: ``module`` and ``argv``, or
``code``, ``cwd``, ``environment``, and ``python`` for what it starts itself. The answers are its process id when it is
started, and its exit code when it has ended; it is killed when the connection is closed before. ``tests/forks.py`` and
``forked_python.py`` ask. It ends with its standard input. MONAI Label, and what imports it, is imported after the fork
only: it reads the environment when it is.
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
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "monai.data", "monai.inferers", "monai.losses", "monai.metrics", "monai.networks.nets", "monai.transforms",
    "nibabel", "SimpleITK", "nrrd", "pydicom", "highdicom", "pydicom_seg", "dicomweb_client", "pynetdicom",
    "scipy.ndimage", "scipy.stats", "PIL.Image", "fastapi", "fastapi.sse", "uvicorn", "requests", "psutil", "yaml",
    "jinja2", "prometheus_client", "filelock", "cachetools", "bcrypt", "cryptography.x509", "diskcache", "dotenv",
    "fastapi_offline", "girder_client", "h11", "jwt", "passlib.context", "passlib.hash", "pydantic_settings",
    "requests_toolbelt", "schedule", "timeloop", "torch._dynamo", "torch.utils.tensorboard", "watchdog.observers",
)  # fmt: skip

# With what they import, most of this project's modules; none of them is one that a process runs.
PROJECT = (
    "lib.activelearning.pool_scoring", "lib.cluster.batch", "lib.datastore.images.sent_series",
    "lib.datastore.label_files.label_folder", "lib.dicom.query", "lib.dicom.remote", "lib.interaction.background",
    "lib.server.http.bodies", "lib.server.http.encryption", "lib.server.pages.cases.slices", "lib.server.work.places",
    "lib.trainers.gathering", "lib.trainers.judging.publishing", "lib.trainers.launch",
)  # fmt: skip

LINKS: dict[int, socket.socket] = {}
"""Where each process that has not ended is waited for."""

Request = tuple[dict[str, Any], list[int], socket.socket]
"""What is asked for, its standard streams, and who asks."""


def main() -> None:
    """Fork for each request until the input ends; a fork becomes the server."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[1])
        listener.listen()  # who asks now is answered when the libraries are there
        for name in (*LIBRARIES, *PROJECT):
            importlib.import_module(name)
        if "monailabel" in sys.modules:
            raise RuntimeError("MONAI Label is imported before the fork, and has read this process's environment")
        gc.freeze()
        signal.signal(signal.SIGCHLD, tell_ended)
        for request, streams, link in requests(listener):
            # nothing is told to have ended before it has started
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            if (process := os.fork()) == 0:
                for place in (listener, link, *LINKS.values()):
                    place.close()
                become(request, streams)
                return
            LINKS[process] = link
            with contextlib.suppress(OSError):  # whoever asked was killed
                link.send(str(process).encode())
            for stream in streams:
                os.close(stream)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def requests(listener: socket.socket) -> Iterator[Request]:
    """What is asked for, connection by connection, until the input ends."""
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                link, _ = listener.accept()
                text, streams, *_ = socket.recv_fds(link, 2**20, 3)
                selector.register(link, selectors.EVENT_READ)
                yield json.loads(text), streams, link
            else:  # it says nothing more: it has been told the end, or was killed
                selector.unregister(key.fileobj)
                kill_what_was_asked_for(key.fileobj)


def kill_what_was_asked_for(link: Any) -> None:
    """End what was started for a connection, whose other end is gone."""
    for process in [process for process, other in list(LINKS.items()) if other is link]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    link.close()


def tell_ended(*_: object) -> None:
    """Tell of every process that has ended."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not process:
            return
        with contextlib.suppress(OSError):  # whoever asked was killed
            LINKS.pop(process).send(str(os.waitstatus_to_exitcode(status)).encode())


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Be ``python -m MODULE ARGV``, or ``python -c CODE``."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    for target, source in enumerate(streams):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # a library has asked for it, and this process's environment may name another
    sys.executable, sys.path[0] = request.get("python") or sys.executable, str(Path.cwd())
    if code := request.get("code"):
        sys.argv, sys.modules["__main__"] = ["-c"], types.ModuleType("__main__")
        exec(compile(code, "<code>", "exec"), sys.modules["__main__"].__dict__)
        return
    sys.argv = [request["module"], *request["argv"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
