"""Keeps the current weights of a preset loaded on each lane."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lib.configs.preset import Preset
from lib.errors import ModelNotReadyError
from lib.infers.compiling import compile_if_faster
from lib.infers.devices.lane import Lane
from lib.infers.plan import Planner
from lib.infers.segmenter import Segmenter
from lib.models.calibration import Calibration, read_calibration
from lib.models.weights import Origin, WeightsFile, WeightsLocator, preset_for
from lib.networks.checkpoint import read_checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A network that is ready for use, and its description for responses."""

    segmenter: Segmenter
    preset: Preset
    origin: Origin
    version: str
    stamp: tuple[str, int, int] = ("", 0, 0)
    calibration: Calibration | None = None

    def describe(self) -> dict[str, str]:
        """Preset, version and origin, for the JSON of a response."""
        return {"preset": self.preset.name, "version": self.version, "origin": self.origin}


@dataclass
class _Kept:
    """The model that a lane has loaded; the lock is held while it changes."""

    lane: Lane
    lock: threading.Lock = field(default_factory=threading.Lock)
    stamp: tuple[str, int, int] = ("", 0, 0)
    generation: int = 0
    model: LoadedModel | None = None


class ModelCache:
    """Loads and keeps the current weights of a preset, for each lane.

    Args:
        preset: the preset as configured.
        locator: finds the weights.
        precision, planner: see :class:`Segmenter`.
        compiles: whether loaded models are compiled in the background while they serve requests; computing threads hold
            the lock of their lane.
        compile_model: compiles a model, given the lock of the lane.
    """

    def __init__(
        self,
        preset: Preset,
        locator: WeightsLocator,
        precision: str = "auto",
        planner: Planner | None = None,
        compiles: bool = False,
        compile_model: Callable[[Segmenter, threading.Lock], None] = compile_if_faster,
    ) -> None:
        self._preset, self._locator, self._precision, self._planner = preset, locator, precision, planner
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()
        self._compiles, self._compile_model, self._compiling = compiles, compile_model, threading.Lock()
        self._background: threading.Thread | None = None

    def get(self, where: Lane | torch.device) -> LoadedModel:
        """Return the current model on a lane or device; a changed file is loaded again.

        Raises:
            ModelNotReadyError: if the preset has no weights.
            CheckpointError: if they cannot be read or do not match the network.
        """
        kept = self._place(where)
        with kept.lock:  # only this lane is locked: others continue while it loads
            file = self._locator.find()
            if file is None:
                raise ModelNotReadyError(
                    f"{self._preset.name!r} has no trained weights yet; train it, or start with --conf pretrained FILE"
                )
            stamp, generation = file.stamp, kept.lane.generation
            if kept.model is None or kept.stamp != stamp or kept.generation != generation:
                kept.model = None  # the replaced model is freed first to make room
                kept.model, kept.stamp = self._load(file, stamp, kept.lane.device), stamp
                kept.generation = generation
                self._compile(kept)
            return kept.model

    def _place(self, where: Lane | torch.device) -> _Kept:
        with self._lock:
            name = where.name if isinstance(where, Lane) else str(where)
            if name not in self._kept:
                self._kept[name] = _Kept(where if isinstance(where, Lane) else Lane(name, where))
            return self._kept[name]

    def settle(self) -> None:
        """Wait for compilations in the background."""
        with self._lock:
            background = self._background
        if background is not None:
            background.join()

    def _compile(self, kept: _Kept) -> None:
        """Start a compilation, one at a time. The thread is no daemon, since exit would stop it inside of C++ code."""
        model = kept.model
        if not self._compiles or model is None:
            return

        def work() -> None:
            with self._compiling:
                if kept.model is model:
                    self._compile_model(model.segmenter, kept.lane.lock)

        with self._lock:
            self._background = threading.Thread(target=work, name=f"compile {self._preset.name}")
            self._background.start()

    def _load(self, file: WeightsFile, stamp: tuple[str, int, int], device: torch.device) -> LoadedModel:
        checkpoint = read_checkpoint(file.path)
        preset = preset_for(checkpoint, self._preset)
        segmenter = Segmenter.from_checkpoint(checkpoint, preset, device, self._precision, self._planner)
        version = str(checkpoint.info.get("version", file.origin))
        return LoadedModel(segmenter, preset, file.origin, version, stamp, read_calibration(file.path))
