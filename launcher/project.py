"""Where things lie in the project's folder, and the environment of its programs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from launcher.processes import WINDOWS

SERVER_ENVIRONMENT = {
    # MLflow no longer takes the file store that MONAI Label writes to: every training would end in an error
    "MONAI_LABEL_TRACKING_ENABLED": "false",
    # it starts a process that scores all images at each start, next sample and training
    "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    "MONAI_LABEL_DATASTORE_FILE_EXT": '["*.nii.gz","*.nii","*.nrrd"]',
    # threads that wait for each other let go of the core; where another program computes too, each of a network's
    # hundreds of operations would otherwise wait for a scheduler's turn
    "OMP_WAIT_POLICY": "passive",
    # glibc makes eight regions of memory a core, and each keeps the most that a request has taken in it
    "MALLOC_ARENA_MAX": "4",
}


@dataclass(frozen=True)
class Project:
    """A checkout of this project."""

    root: Path

    @property
    def venv(self) -> Path:
        """Folder of the virtual environment."""
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """Path of the virtual environment's Python, whether it exists or not."""
        return self.venv / ("Scripts/python.exe" if WINDOWS else "bin/python")

    @property
    def stamp(self) -> Path:
        """The file that says what the last finished install installed."""
        return self.venv / "installed.json"

    @property
    def app(self) -> Path:
        """MONAI Label's app."""
        return self.root / "apps" / "unetr_radiology"

    @property
    def sample_studies(self) -> Path:
        """Folder of the synthetic sample cases."""
        return self.root / "studies" / "sample"


def server_environment(project: Project) -> dict[str, str]:
    """This process's environment, with what the server needs where the user has not set it."""
    environment = {**SERVER_ENVIRONMENT, **os.environ}
    path = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(project.root), *([path] if path else [])])
    return environment
