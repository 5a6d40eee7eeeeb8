"""Orthanc as a PACS: Debian's, in a process of its own, on a loopback port, with a password."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import requests

from tests.integration.server import free_port

PLUGINS = Path("/usr/share/orthanc/plugins")
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
        if program is None or plugin is None:
            pytest.skip("needs Orthanc and its DICOMweb plugin: apt-get install orthanc orthanc-dicomweb")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.dicomweb = f"{self.url}/dicom-web"
        self.http = requests.Session()
        self.http.auth = (USER, PASSWORD)
        configuration = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": self.port,
            "HttpBindAddresses": ["127.0.0.1"],
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
            self._process = subprocess.Popen([program, str(file)], stdout=log, stderr=subprocess.STDOUT)
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

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)
