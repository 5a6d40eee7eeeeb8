"""The weights of a run: found on one machine, sent to other machines, and loaded there."""

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
    """A loaded network, and its version."""

    segmenter: Segmenter
    name: str
    version: str
    weights_sha256: str
    calibration: Calibration | None = None


@dataclass(frozen=True)
class ModelFile:
    """Weights that are not loaded yet.

    Attributes:
        name: name of the preset.
        version, sha256: identify the weights.
        content: content of the file, for machines that cannot read ``path``.
        compiles: whether OpenVINO is used on a CPU if it was measured to be faster.
        precision: see :class:`lib.infers.segmenter.Segmenter`.
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
        """The weights that a server would use.

        Raises:
            CheckpointError: if there are none, or only damaged ones.
        """
        file = locator.find()
        if file is None:
            raise CheckpointError(f"there are no weights of {preset.name!r} in {str(locator.folder)!r}")
        return cls.of(preset, file, compiles, precision)

    @classmethod
    def of(cls, preset: Preset, file: WeightsFile, compiles: bool = True, precision: str = "auto") -> ModelFile:
        """A specific weights file."""
        checksum, calibration = sha256_of(file.path), read_calibration(file.path)
        return cls(preset, preset.name, file.version, checksum, file.path, calibration, None, compiles, precision)

    def packed(self) -> ModelFile:
        """A copy that includes the file's content, to be sent."""
        return replace(self, content=self.path.read_bytes())

    def load(self, device: str | None) -> Model:
        """Load it on a device; if OpenVINO is to be tried, this is done before the first case.

        Raises:
            CheckpointError: if the weights cannot be read or do not match.
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
