"""Paths in the project's folder, and the environment of its programs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from launcher.processes import WINDOWS

SERVER_ENVIRONMENT = {
    # MLflow no longer supports the file store of MONAI Label, with which every training would fail
    "MONAI_LABEL_TRACKING_ENABLED": "false",
    # MONAI Label would score all images at each start, next sample and training
    "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    "MONAI_LABEL_DATASTORE_FILE_EXT": '["*.nii.gz","*.nii","*.nrrd"]',
    # waiting threads release the core; otherwise, if another program computes too, each of a network's hundreds of
    # operations would wait for the scheduler
    "OMP_WAIT_POLICY": "passive",
    # glibc creates eight memory regions for each core, each of which keeps its peak size
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
        """The file that records the last finished installation."""
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
    """This process's environment, with defaults for the server where the user has set nothing."""
    environment = {**SERVER_ENVIRONMENT, **os.environ}
    path = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(project.root), *([path] if path else [])])
    return environment
