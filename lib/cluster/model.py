"""The weights that segment, as they are found, sent to other machines, and loaded there."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from lib.configs.preset import Preset
from lib.errors import CheckpointError
from lib.infers.compiling import compile_if_faster
from lib.infers.segmenter import Segmenter
from lib.models.calibration import Calibration, read_calibration
from lib.models.weights import WeightsFile, WeightsLocator, preset_for
from lib.networks.checkpoint import read_checkpoint
from lib.networks.precision import resolve_device
from lib.storage.files import sha256_of


@dataclass(frozen=True)
class Model:
    """What segments: a network, and which weights it has."""

    segmenter: Segmenter
    name: str
    version: str
    weights_sha256: str
    calibration: Calibration | None = None


@dataclass(frozen=True)
class ModelFile:
    """Weights that are not loaded yet.

    Attributes:
        name: of the preset.
        version, sha256: of the weights; they say which they are.
        content: the file itself, where it goes to a machine that cannot read ``path``.
        compiles: whether OpenVINO computes on a CPU where it was measured to be faster.
        precision: as :class:`lib.infers.segmenter.Segmenter`.
    """

    preset: Preset
    name: str
    version: str
    sha256: str
    path: Path
    calibration: Calibration | None = None
    content: bytes | None = None
    compiles: bool = True
    precision: str = "auto"

    @classmethod
    def find(cls, preset: Preset, locator: WeightsLocator, compiles: bool = True, precision: str = "auto") -> ModelFile:
        """The weights that a server would serve.

        Raises:
            CheckpointError: when there are none, or damaged ones only.
        """
        file = locator.find()
        if file is None:
            raise CheckpointError(f"there are no weights of {preset.name!r} in {str(locator.folder)!r}")
        return cls.of(preset, file, compiles, precision)

    @classmethod
    def of(cls, preset: Preset, file: WeightsFile, compiles: bool = True, precision: str = "auto") -> ModelFile:
        """A certain file of weights."""
        checksum, calibration = sha256_of(file.path), read_calibration(file.path)
        return cls(preset, preset.name, file.version, checksum, file.path, calibration, None, compiles, precision)

    def packed(self) -> ModelFile:
        """The same with the file's content, to be sent."""
        return replace(self, content=self.path.read_bytes())

    def load(self, device: str | None) -> Model:
        """Load it on a device; with OpenVINO, where that is to be tried, before the first case and not during it.

        Raises:
            CheckpointError: when the weights cannot be read or do not fit.
        """
        if self.content is None:
            checkpoint = read_checkpoint(self.path)
        else:
            with tempfile.TemporaryDirectory(prefix="unetr-") as folder:
                file = Path(folder) / self.path.name
                file.write_bytes(self.content)
                checkpoint = read_checkpoint(file)
        preset = preset_for(checkpoint, self.preset)
        segmenter = Segmenter.from_checkpoint(checkpoint, preset, resolve_device(device), self.precision)
        if self.compiles:
            compile_if_faster(segmenter, threading.Lock())
        return Model(segmenter, self.name, self.version, self.sha256, self.calibration)
