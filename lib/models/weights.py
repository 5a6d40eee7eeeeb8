"""Where a preset's weights are: the live version, else pretrained, else shipped."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lib.configs.preset import Preset
from lib.errors import CheckpointError
from lib.networks.checkpoint import Checkpoint

Origin = Literal["published", "pretrained", "shipped"]

LIVE_FILE = "live.json"
WEIGHTS_FILE = "weights.pt"
VERSION_FILE = "version.json"
SHIPPED = "shipped"
VERSION_NAME = re.compile(r"v\d{4,9}")
"""A published or rejected version: ``v0001`` and counting."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights and where it comes from."""

    path: Path
    origin: Origin

    @property
    def version(self) -> str:
        """Name of the version: its folder's, or ``pretrained`` or ``shipped``."""
        return self.path.parent.name if self.origin == "published" else self.origin

    @property
    def side_car(self) -> Path:
        """The JSON beside them that says what they are and how good, where there is one."""
        return self.path.with_name(VERSION_FILE) if self.origin == "published" else self.path.with_suffix(".json")

    @property
    def stamp(self) -> tuple[str, int, int]:
        """Changes when the file does."""
        status = self.path.stat()
        return str(self.path), status.st_mtime_ns, status.st_size


def read_live(folder: Path) -> str | None:
    """The version that a preset's live pointer names.

    Args:
        folder: ``model/<preset>``.

    Returns:
        ``v0001`` and counting, or ``shipped``; None where nothing has been published, or all of it withdrawn.

    Raises:
        CheckpointError: when the pointer is not one.
    """
    try:
        name = json.loads((folder / LIVE_FILE).read_text(encoding="utf-8"))["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder.name}/{LIVE_FILE} cannot be used: {error}") from error
    if not isinstance(name, str) or not (name == SHIPPED or VERSION_NAME.fullmatch(name)):
        raise CheckpointError(f"{folder.name}/{LIVE_FILE} names the version {name!r}; valid: {SHIPPED}, v0001, ...")
    return name


class WeightsLocator:
    """Knows where the weights of one preset can be.

    Args:
        folder: ``model/<preset>``: ``shipped.pt`` comes with the project, training adds a folder a version, and
            ``live.json`` names the one that is served.
        pretrained: path or URL of weights of one's own.
    """

    def __init__(self, folder: Path, pretrained: str | None = None) -> None:
        self.folder = folder
        self.shipped = folder / "shipped.pt"
        self._pretrained = pretrained

    def find(self) -> WeightsFile | None:
        """The live version; where there is none, pretrained weights (downloaded if it is a URL), or the shipped ones.

        Raises:
            CheckpointError: when the live version or pretrained weights are named but are not there.
        """
        live = read_live(self.folder)
        if live is None and self._pretrained:
            return WeightsFile(self._local_pretrained(self._pretrained), "pretrained")
        if live in (None, SHIPPED):
            return WeightsFile(self.shipped, "shipped") if self.shipped.is_file() else None
        path = self.folder / live / WEIGHTS_FILE
        if not path.is_file():
            raise CheckpointError(f"{self.folder.name}/{LIVE_FILE} names {live!r}, whose weights are not there")
        return WeightsFile(path, "published")

    def is_known(self) -> bool:
        """Whether there are weights, without downloading any."""
        return (self.folder / LIVE_FILE).is_file() or bool(self._pretrained) or self.shipped.is_file()

    def _local_pretrained(self, source: str) -> Path:
        if not source.startswith(("http://", "https://")):
            path = Path(source)
            if not path.is_file():
                raise CheckpointError(f"--conf pretrained: there is no file {source!r}")
            return path
        target = self.folder / f"pretrained-{hashlib.sha256(source.encode()).hexdigest()[:12]}.pt"
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(source, str(target), progress=False)
            except OSError as error:
                raise CheckpointError(f"--conf pretrained: {source!r} cannot be downloaded: {error}") from error
        return target


def preset_for(checkpoint: Checkpoint, configured: Preset) -> Preset:
    """The preset to run weights with: the one that they were trained with, served as configured.

    Spacing, window, intensity and network come from the checkpoint; labels' colours and aliases and the inference
    options from the configuration.

    Raises:
        CheckpointError: when the weights segment other labels than configured.
    """
    trained = checkpoint.preset
    if trained is None:
        return configured
    if trained.label_indices != configured.label_indices:
        raise CheckpointError(
            f"the weights segment {trained.label_indices}, but {configured.name!r} has {configured.label_indices}"
        )
    served = {"name": configured.name, "labels": configured.labels, "inference": configured.inference}
    return trained.model_copy(update=served)
