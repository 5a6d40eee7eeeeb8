"""Finds the editor network for the clicks of a preset: one trained on this server, else the shipped one, or none.

model/<preset>/editor/v0001/weights.pt, version.json    a version that was trained on this server's labels
model/<preset>/editor/live.json                         names the version in use model/editor/shipped.pt
the editor of all presets, where there is none of its own
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
    """Finds the editor of one preset at each request, so that a new version is used without a restart.

    Args:
        preset: name of the preset.
        folder: ``model/<preset>/editor``.
        shared: the editor for all presets; None if there is none.
    """

    def __init__(self, preset: str, folder: Path, shared: SharedEditor | None = None) -> None:
        self.preset, self.versions = preset, VersionStore(folder)
        self._shared, self._locator, self._lock = shared, WeightsLocator(folder), threading.Lock()
        self._own: tuple[tuple[object, ...], SharedEditor] | None = None

    def current(self) -> SharedEditor | None:
        """The editor; None where clicks use region growing.

        Raises:
            CheckpointError: if the file of the shared editor is damaged.
        """
        with self._lock:
            file = self._locator.find() if self._locator.is_known() else None
            if file is None:
                return self._shared if self._shared is not None and self._shared.serves(self.preset) else None
            if self._own is None or self._own[0] != file.stamp:
                self._own = file.stamp, SharedEditor(file.path)
            return self._own[1]

    def version(self) -> str:
        """The name of the version that was trained on this server and is in use; empty for none.

        Raises:
            CheckpointError: if the configured weights cannot be read.
        """
        with self._lock:
            file = self._locator.find() if self._locator.is_known() else None
        return "" if file is None else file.version

    def serving(self) -> tuple[str, str]:
        """The result of :meth:`version`, and the reason if it is not the configured version."""
        try:
            return self.version(), self._locator.problem
        except CheckpointError as error:
            return "", str(error)
