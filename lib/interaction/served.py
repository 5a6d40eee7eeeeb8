"""The editor that clicks of a preset are shown to: one that was trained here, else the one for all presets, or none.

model/<preset>/editor/v0001/weights.pt, version.json    a version that was trained on this server's labels
model/<preset>/editor/live.json                         names the version that is served
model/editor/shipped.pt                                 the editor of all presets, where there is none of its own
"""

from __future__ import annotations

import threading
from pathlib import Path

from lib.errors import CheckpointError
from lib.interaction.editor import SharedEditor
from lib.models.versions import VersionStore
from lib.models.weights import WeightsLocator

FOLDER = "editor"


class ServedEditor:
    """Finds the editor of one preset anew at each request, so that a new version is taken at once.

    Args:
        preset: its name.
        folder: ``model/<preset>/editor``.
        shared: the editor of all presets, where there is one.
    """

    def __init__(self, preset: str, folder: Path, shared: SharedEditor | None = None) -> None:
        self.preset, self.versions = preset, VersionStore(folder)
        self._shared, self._locator, self._lock = shared, WeightsLocator(folder), threading.Lock()
        self._own: tuple[tuple[object, ...], SharedEditor] | None = None

    def current(self) -> SharedEditor | None:
        """The editor; None where clicks grow without weights.

        Raises:
            CheckpointError: when the file of the shared editor is damaged.
        """
        with self._lock:
            file = self._locator.find() if self._locator.is_known() else None
            if file is None:
                return self._shared if self._shared is not None and self._shared.serves(self.preset) else None
            if self._own is None or self._own[0] != file.stamp:
                self._own = file.stamp, SharedEditor(file.path)
            return self._own[1]

    def version(self) -> str:
        """The name of the version that was trained here and is served; empty for none.

        Raises:
            CheckpointError: when the weights that should be served cannot be.
        """
        with self._lock:
            file = self._locator.find() if self._locator.is_known() else None
        return "" if file is None else file.version

    def serving(self) -> tuple[str, str]:
        """As :meth:`version`, and why it is not the one that should be served, in words."""
        try:
            return self.version(), self._locator.problem
        except CheckpointError as error:
            return "", str(error)
