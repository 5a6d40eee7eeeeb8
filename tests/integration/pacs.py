"""Orthanc as a PACS: Debian's, in a process and a network of its own, reached on a loopback port, with a password."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from tests.integration import loopback

PLUGINS = Path("/usr/share/orthanc/plugins")
OWN_NETWORK = ["unshare", "--map-root-user", "--net"]
USER, PASSWORD = "radiology", "a secret"
SECONDS_TO_START = 30


class Orthanc:
    """A running Orthanc.

    Args:
        folder: for its database and configuration.
    """

    def __init__(self, folder: Path) -> None:
        plugin = next(iter(sorted(PLUGINS.glob("libOrthancDicomWeb*"))), None)
        program = shutil.which("Orthanc")
        if shutil.which(OWN_NETWORK[0]) is None:
            pytest.skip("needs unshare, of util-linux")
        if program is None or plugin is None:
            pytest.skip("needs Orthanc and its DICOMweb plugin: apt-get install orthanc orthanc-dicomweb")
        if subprocess.run([*OWN_NETWORK, "true"], check=False).returncode:
            pytest.skip("needs a network namespace: Orthanc 1.10.1 would listen on every interface")
        folder.mkdir(parents=True, exist_ok=True)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.dicomweb = f"{self.url}/dicom-web"
        self.http = requests.Session()
        self.http.auth = (USER, PASSWORD)
        configuration = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": self.port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "DicomServerEnabled": False,
            "Plugins": [str(plugin)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        file = folder / "orthanc.json"
        file.write_text(json.dumps(configuration))
        with (folder / "orthanc.log").open("wb") as log:
            command = [sys.executable, loopback.__file__, str(listener.fileno()), str(self.port), program, str(file)]
            self._process = subprocess.Popen(
                [*OWN_NETWORK, *command],
                pass_fds=[listener.fileno()],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        listener.close()
        self._wait(folder / "orthanc.log")

    def _wait(self, log: Path) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self.http.get(f"{self.url}/system", timeout=5).ok:
                    return
            except requests.ConnectionError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"Orthanc did not start:\n{log.read_text(errors='replace')[-3000:]}")

    def add(self, files: list[Path]) -> None:
        """Put instances into it, as a modality would."""
        for file in files:
            self.http.post(f"{self.url}/instances", data=file.read_bytes(), timeout=60).raise_for_status()

    def count(self, modality: str) -> int:
        """How many series of a modality it has."""
        query = {"Level": "Series", "Query": {"Modality": modality}}
        return len(self.http.post(f"{self.url}/tools/find", json=query, timeout=60).json())

    def delete(self, series_uid: str) -> None:
        """Delete a series."""
        query = {"Level": "Series", "Query": {"SeriesInstanceUID": series_uid}}
        for found in self.http.post(f"{self.url}/tools/find", json=query, timeout=60).json():
            self.http.delete(f"{self.url}/series/{found}", timeout=60).raise_for_status()

    def hang(self) -> None:
        """Take connections and answer nothing, until ``go_on``."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)
