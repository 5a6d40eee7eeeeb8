"""The newest weights of a preset, loaded on each lane."""

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


@dataclass
class _Kept:
    """What a lane has loaded; the lock is held while that changes."""

    lane: Lane
    lock: threading.Lock = field(default_factory=threading.Lock)
    stamp: tuple[str, int, int] = ("", 0, 0)
    generation: int = 0
    model: LoadedModel | None = None


class ModelCache:
    """Keeps the newest weights of a preset loaded, per lane.

    Args:
        preset: the task as configured.
        locator: where its weights are.
        precision, planner: see :class:`Segmenter`.
        compiles: whether models that are loaded are compiled in the background while they answer; whoever computes
            with one holds its lane's lock.
        compile_model: compiles a model, given the lane's lock.
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
        """Return the newest model on a lane, or on a device; a file that changed is loaded again.

        Raises:
            ModelNotReadyError: when the preset has no weights.
            CheckpointError: when they cannot be read or do not fit.
        """
        kept = self._place(where)
        with kept.lock:  # the lane's alone: others go on while it loads
            file = self._locator.find()
            if file is None:
                raise ModelNotReadyError(
                    f"{self._preset.name!r} has no trained weights yet; train it, or start with --conf pretrained FILE"
                )
            stamp, generation = file.stamp, kept.lane.generation
            if kept.model is None or kept.stamp != stamp or kept.generation != generation:
                kept.model = None  # what is to be replaced makes room first
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
        """Wait for what is compiled in the background."""
        with self._lock:
            background = self._background
        if background is not None:
            background.join()

    def _compile(self, kept: _Kept) -> None:
        """Begin, one model after the other. No daemon: it would be torn off inside of C++ when the server ends."""
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
