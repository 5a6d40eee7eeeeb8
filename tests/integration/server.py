"""A real server in a process of its own, started as a user starts it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import psutil
import requests

from launcher.project import Project
from lib.infers.costs import COSTS_FILE
from tests.forks import REPOSITORY, ForkedProcess, server_environment, start_module, start_python
from tests.server_logs import LOGS

APP = Project(REPOSITORY).app
MAIN = APP / "main.py"
SECONDS_TO_START = 120
SECONDS_TO_STOP = 30
STOCK_APP = "monailabel.app:app"
MEASURED_COSTS: dict[str, dict[str, Any]] = {}
"""What earlier servers of this test run have measured, as it stands in the file of costs."""


class Server:
    """A running server.

    Args:
        folder: for its temporary files, sessions and log; studies and weights are in it too unless given.
        conf: ``--conf`` settings; nothing is scored or compiled in the background unless they say so.
        uvicorn_app: ours, or MONAI Label's own for comparison.
        dicomweb: address of a DICOMweb server, in place of the studies folder.
        environment: variables of its process.
        options: more of MONAI Label's own, such as ``--root_path``.
        forked: started by :func:`tests.forks.fork`, as are its own processes; otherwise as a user starts it, for
            tests about processes.
        module: its command line: MONAI Label's own, or that of ``run.py``.
    """

    def __init__(
        self,
        folder: Path,
        conf: Mapping[str, str] | None = None,
        uvicorn_app: str = "lib.server.app:app",
        dicomweb: str = "",
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        forked: bool = True,
        module: str = "monailabel.main",
    ) -> None:
        self.folder = folder
        self._environment, self._forked, self._module = dict(environment or {}), forked, module
        self.studies, self.models, self.temporary = folder / "studies", folder / "model", folder / "tmp"
        for path in (self.studies, self.models, self.temporary):
            path.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = requests.Session()
        self.seconds_to_answer = 120.0
        self.log = folder / "server.log"
        self._command = ["start_server", "--app", str(APP), "--studies", dicomweb or str(self.studies)]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), "--uvicorn_app", uvicorn_app]
        self._command += options
        quiet = {"model_dir": str(self.models), "scoring_minutes": "0", "retrain": "off", "engine": "pytorch"}
        for key, value in (quiet | dict(conf or {})).items():
            self._command += ["--conf", key, value]
        self.process: subprocess.Popen[bytes] | ForkedProcess | None = None

    def launch(self) -> subprocess.Popen[bytes] | ForkedProcess:
        """Start the process, without waiting for an answer."""
        environment = server_environment() | {
            "TMPDIR": str(self.temporary),
            "MONAI_LABEL_SESSION_PATH": str(self.folder / "sessions"),
        }
        environment |= {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(self.folder / "cache")} | self._environment
        if self._forked:
            self.process = start_module(self._module, self._command, self.folder, environment, self.log)
        else:
            self.process = start_python(["-m", self._module, *self._command], self.folder, environment, self.log)
        LOGS.opened(self.log)
        return self.process

    def start(self) -> Server:
        """Start it and wait until it answers."""
        process = self.launch()
        deadline = time.monotonic() + SECONDS_TO_START
        while not self.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        return self

    def answers(self) -> bool:
        """Whether it answers by now, in whatever way."""
        try:
            return requests.get(f"{self.url}/info/", timeout=20).status_code < 500
        except requests.ConnectionError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        try:
            code = self.process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            LOGS.closed(self.log)
        self._keep_costs()
        return code

    def _keep_costs(self) -> None:
        """Keep what windows cost, as it was measured, for the servers that come after this one."""
        with contextlib.suppress(OSError, ValueError):
            entries = json.loads((self.models / COSTS_FILE).read_text(encoding="utf-8"))
            for key, costs in entries.items():
                MEASURED_COSTS[key] = {batch: cost for batch, cost in costs.items() if batch.isdigit()}

    def children(self) -> list[psutil.Process]:
        """The processes that it has started."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        return self.request("POST", path, **options)

    def put(self, path: str, **options: Any) -> requests.Response:
        return self.request("PUT", path, **options)

    def delete(self, path: str, **options: Any) -> requests.Response:
        return self.request("DELETE", path, **options)

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.http.request(method, self.url + path, timeout=self.seconds_to_answer, **options)

    def infer(self, model: str, image: str = "", session: str = "", **params: Any) -> requests.Response:
        """As 3D Slicer's client asks for a segmentation."""
        wanted = {"client_id": "tester", "result_extension": ".nrrd", "result_dtype": "uint8"} | params
        query = {"image": image} | ({"session_id": session} if session else {})
        return self.post(f"/infer/{model}", params=query, files={"params": (None, json.dumps(wanted))})

    def save_label(self, image: str, label: bytes, names: list[str], tag: str = "final") -> requests.Response:
        """As 3D Slicer's client submits a label: with the full local path as the file's name."""
        info = [{"name": name, "idx": index} for index, name in enumerate(names, start=1)]
        params = {"label_info": info, "model": "hippocampus_mr", "client_id": "tester"}
        files = {"params": (None, json.dumps(params)), "label": ("/home/anna/label.nii.gz", label, "application/gzip")}
        return self.put("/datastore/label", params={"image": image, "tag": tag}, files=files)

    def ready(self, seconds: float = 60) -> requests.Response:
        """The answer of ``/readyz`` once no weights are being loaded any more."""
        deadline = time.monotonic() + seconds
        while "loading" in (answer := self.get("/readyz")).json()["models"].values():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not loaded after {seconds} s: {answer.text}")
            time.sleep(0.1)
        return answer

    def wait_for(self, path: str, seconds: float = 120) -> dict[str, Any]:
        """Poll a status until the task has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status: dict[str, Any] = self.get(path).json()
            if status["status"] not in ("SUBMITTED", "RUNNING"):
                return status
            time.sleep(0.3)
        raise TimeoutError(f"{path} still says {status}")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parse_multipart(response: requests.Response) -> dict[str, tuple[str | None, bytes]]:
    """The parts of an answer, in order: name to file name and content."""
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + response.content)
    parts = {}
    for part in message.get_payload():
        name = part.get_param("name", header="content-disposition")
        parts[name] = (part.get_filename(), part.get_payload(decode=True))
    return parts


def read_nrrd(content: bytes, folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Voxels and header of an answer's mask, by way of a file in ``folder``."""
    path = folder / "answer.nrrd"
    path.write_bytes(content)
    voxels, header = nrrd.read(str(path))
    return voxels, header


def fingerprint(*folders: Path) -> dict[str, str]:
    """Every file below the folders (or a file itself), with the SHA-256 of its content.

    SQLite's ``-shm`` is left out: it holds no data, and reading changes it too.
    """
    places = [[folder] if folder.is_file() else sorted(folder.rglob("*")) for folder in folders]
    files = [path for place in places for path in place if path.is_file() and not path.name.endswith("-shm")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_until(condition: Callable[[], object], seconds: float = 180) -> None:
    """Wait until something is so; the time is that of a machine that does much else."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {seconds} s")
        time.sleep(0.2)
