"""Start servers as forks of a process in which the libraries are imported already, which is most of a start.

    python starter.py

Each line of standard input asks for a server, as JSON: ``argv``, ``cwd``, ``environment``, ``log``; or, with ``code``,
for a program of its own. Each line of the output is a process id, alone when it is started, with its exit code when it
has ended. Nothing of this project or of MONAI Label is imported before the fork: they read the environment when they
are.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
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


def main() -> None:
    """Fork for each request until the input ends; a fork becomes the server."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, tell_ended)
    for line in sys.stdin:
        # nothing is told to have ended before it has started
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        if (process := os.fork()) == 0:
            become(json.loads(line))
            return
        tell(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def tell(*numbers: int) -> None:
    """Write a line of the output at once."""
    os.write(1, (" ".join(map(str, numbers)) + "\n").encode())


def tell_ended(*_: object) -> None:
    """Tell of every server that has ended."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not process:
            return
        tell(process, os.waitstatus_to_exitcode(status))


def become(request: dict[str, Any]) -> None:
    """Be ``python -m monailabel.main ARGV``, or ``python -c CODE``."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    with open(os.devnull, "rb") as nothing, open(request["log"], "wb") as log:
        for target, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source.fileno(), target)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = str(Path.cwd())
    if request["code"]:
        sys.argv = ["-c"]
        exec(compile(request["code"], "<code>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = ["monailabel.main", *request["argv"]]
    runpy.run_module("monailabel.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
