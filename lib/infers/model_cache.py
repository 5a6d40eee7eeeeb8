"""The newest weights of a preset, loaded on each device."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from lib.configs.preset import Preset
from lib.errors import ModelNotReadyError
from lib.infers.compiling import compile_if_faster
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.models.calibration import Calibration, read_calibration
from lib.models.weights import Origin, WeightsFile, WeightsLocator, preset_for
from lib.networks.checkpoint import read_checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A network that is ready, and what is said about it in answers."""

    segmenter: Segmenter
    preset: Preset
    origin: Origin
    version: str
    stamp: tuple[str, int, int] = ("", 0, 0)
    calibration: Calibration | None = None

    def describe(self) -> dict[str, str]:
        """Preset, version and origin, for an answer's JSON."""
        return {"preset": self.preset.name, "version": self.version, "origin": self.origin}


class ModelCache:
    """Keeps the newest weights of a preset loaded, per device.

    Args:
        preset: the task as configured.
        locator: where its weights are.
        precision, planner: see :class:`Segmenter`.
        computing: held by whoever computes with a model. With it, models that are loaded are compiled in the
            background (:func:`compile_if_faster`) while they answer.
    """

    def __init__(
        self,
        preset: Preset,
        locator: WeightsLocator,
        precision: str = "auto",
        planner: Planner | None = None,
        computing: threading.Lock | None = None,
    ) -> None:
        self._preset, self._locator, self._precision, self._planner = preset, locator, precision, planner
        self._loaded: dict[torch.device, tuple[tuple[str, int, int], LoadedModel]] = {}
        self._lock = threading.Lock()
        self._computing, self._compiling = computing, threading.Lock()
        self._background: threading.Thread | None = None

    def get(self, device: torch.device) -> LoadedModel:
        """Return the newest model on ``device``; a file that changed is loaded again.

        Raises:
            ModelNotReadyError: when the preset has no weights.
            CheckpointError: when they cannot be read or do not fit.
        """
        with self._lock:
            file = self._locator.find()
            if file is None:
                raise ModelNotReadyError(
                    f"{self._preset.name!r} has no trained weights yet; train it, or start with --conf pretrained FILE"
                )
            stamp = file.stamp
            kept = self._loaded.get(device)
            if kept is None or kept[0] != stamp:
                kept = (stamp, self._load(file, stamp, device))
                self._loaded[device] = kept
                self._compile(kept[1].segmenter, device)
            return kept[1]

    def settle(self) -> None:
        """Wait for what is compiled in the background."""
        with self._lock:
            background = self._background
        if background is not None:
            background.join()

    def _compile(self, segmenter: Segmenter, device: torch.device) -> None:
        """Begin, one model after the other. No daemon: it would be torn off inside of C++ when the server ends."""
        computing = self._computing
        if computing is None:
            return

        def work() -> None:
            with self._compiling:
                if self._loaded[device][1].segmenter is segmenter:
                    compile_if_faster(segmenter, computing)

        self._background = threading.Thread(target=work, name=f"compile {self._preset.name}")
        self._background.start()

    def _load(self, file: WeightsFile, stamp: tuple[str, int, int], device: torch.device) -> LoadedModel:
        checkpoint = read_checkpoint(file.path)
        preset = preset_for(checkpoint, self._preset)
        segmenter = Segmenter.from_checkpoint(checkpoint, preset, device, self._precision, self._planner)
        version = str(checkpoint.info.get("version", file.origin))
        return LoadedModel(segmenter, preset, file.origin, version, stamp, read_calibration(file.path))
