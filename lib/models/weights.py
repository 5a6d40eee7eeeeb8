"""Finds the weights of a preset: the live version, otherwise pretrained weights, otherwise the shipped ones."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lib.configs.preset import Preset
from lib.errors import CheckpointError
from lib.networks.checkpoint import Checkpoint, fitting, read_checkpoint
from lib.networks.unetr import build_unetr
from lib.storage.files import sha256_of
from lib.storage.json_files import read_json, read_object

logger = logging.getLogger("unetr.publish")

Origin = Literal["published", "pretrained", "shipped"]

LIVE_FILE = "live.json"
WEIGHTS_FILE = "weights.pt"
VERSION_FILE = "version.json"
SHIPPED = "shipped"
VERSION_NAME = re.compile(r"v\d{4,9}")
"""Name of a stored version: ``v0001`` and so on."""


@dataclass(frozen=True)
class WeightsFile:
    """A weights file and its origin."""

    path: Path
    origin: Origin

    @property
    def version(self) -> str:
        """Name of the version: that of its folder, or ``pretrained`` or ``shipped``."""
        return self.path.parent.name if self.origin == "published" else self.origin

    @property
    def side_car(self) -> Path:
        """The JSON file with its description and scores."""
        return self.path.with_name(VERSION_FILE) if self.origin == "published" else self.path.with_suffix(".json")

    @property
    def stamp(self) -> tuple[str, int, int]:
        """A value that changes when the file changes."""
        status = self.path.stat()
        return str(self.path), status.st_mtime_ns, status.st_size


def read_live(folder: Path) -> str | None:
    """The version that a preset's live pointer names.

    Args:
        folder: ``model/<preset>``.

    Returns:
        ``v0001`` and so on, or ``shipped``; None if nothing has been published, or everything was withdrawn.

    Raises:
        CheckpointError: if the pointer is invalid.
    """
    try:
        name = read_json(folder / LIVE_FILE)["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder.name}/{LIVE_FILE} cannot be used: {error}") from error
    if not isinstance(name, str) or not (name == SHIPPED or VERSION_NAME.fullmatch(name)):
        raise CheckpointError(f"{folder.name}/{LIVE_FILE} names the version {name!r}; valid: {SHIPPED}, v0001, ...")
    return name


def read_details(path: Path) -> dict[str, Any]:
    """The description of a version, from its ``version.json``; empty if that is missing or damaged."""
    return read_object(path)


def damage_of(weights: Path) -> str:
    """A sentence that says how a version's weights file is damaged; empty if it is intact.

    An unchanged file is checked only once.
    """
    try:
        status = weights.stat()
    except OSError:
        return f"the weights of version {weights.parent.name!r} are not there"
    return _damage_of(weights, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1000)
def _damage_of(weights: Path, mtime_ns: int, size: int) -> str:
    name, kept = weights.parent.name, read_details(weights.with_name(VERSION_FILE)).get("sha256")
    try:
        if kept is None:
            _check_network(read_checkpoint(weights))
        elif sha256_of(weights) != kept:
            return f"the weights of version {name!r} are damaged: their SHA-256 is another one"
    except (CheckpointError, OSError) as error:
        return f"the weights of version {name!r} cannot be used: {error}"
    return ""


def _check_network(checkpoint: Checkpoint) -> None:
    """Refuse weights that do not match the network of their own preset.

    Raises:
        CheckpointError: naming the mismatch.
    """
    if checkpoint.preset is not None:
        with torch.device("meta"):  # allocates no memory
            network = build_unetr(checkpoint.preset)
        fitting(checkpoint.model, network)


def _number(name: object) -> int:
    """The number in a version's name; 0 for other names."""
    return int(name[1:]) if isinstance(name, str) and VERSION_NAME.fullmatch(name) else 0


class WeightsLocator:
    """Finds the weights of one preset.

    Args:
        folder: ``model/<preset>``: ``shipped.pt`` comes with the project, training adds one folder for each version,
            and ``live.json`` names the live version.
        pretrained: path or URL of the user's own weights.

    Attributes:
        problem: why the weights that were found last are not the configured ones; empty if they are.
    """

    def __init__(self, folder: Path, pretrained: str | None = None) -> None:
        self.folder = folder
        self.shipped = folder / "shipped.pt"
        self._pretrained = pretrained
        self.problem = ""

    def find(self) -> WeightsFile | None:
        """The live version, otherwise pretrained weights (downloaded if given as a URL), otherwise the shipped ones.

        If the weights of the live version are damaged or missing, its nearest intact predecessor is used instead, and
        :attr:`problem` and the log state the reason.

        Raises:
            CheckpointError: if there are only damaged weights, or if the pretrained ones are missing.
        """
        file, problem = self._search()
        if problem and problem != self.problem:
            logger.error("%s: %s; served instead: %s", self.folder.name, problem, file.version if file else "nothing")
        self.problem = problem
        if file is None and problem:
            raise CheckpointError(f"{self.folder.name}: {problem}")
        return file

    def _search(self) -> tuple[WeightsFile | None, str]:
        """The weights to use, and the problem with the configured ones."""
        problems = []
        try:
            name = read_live(self.folder)
        except CheckpointError as error:
            problems.append(str(error))
            name = self._newest_published(below=None)
        while name not in (None, SHIPPED):
            path = self.folder / str(name) / WEIGHTS_FILE
            if not (damage := damage_of(path)):
                return WeightsFile(path, "published"), "; ".join(problems)
            problems.append(damage)
            name = self._before(str(name))
        if name is None and self._pretrained:
            return WeightsFile(self._local_pretrained(self._pretrained), "pretrained"), "; ".join(problems)
        return (WeightsFile(self.shipped, "shipped") if self.shipped.is_file() else None), "; ".join(problems)

    def _before(self, name: str) -> str | None:
        """The predecessor of a version: its parent, or otherwise the newest published version before it."""
        parent = read_details(self.folder / name / VERSION_FILE).get("parent")
        if parent in (SHIPPED, "pretrained", "") or (_number(parent) and _number(parent) < _number(name)):
            return parent if parent == SHIPPED or _number(parent) else None
        return self._newest_published(below=_number(name))

    def _newest_published(self, below: int | None) -> str | None:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        published = [
            name
            for name in names
            if _number(name)
            and (below is None or _number(name) < below)
            and read_details(self.folder / name / VERSION_FILE).get("status") == "published"
        ]
        return max(published, key=_number, default=None)

    def is_known(self) -> bool:
        """Whether there are weights; nothing is downloaded."""
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
    """The preset with which weights are run: their training preset, with the configured presentation.

    Spacing, window, intensity and network come from the checkpoint; the labels' colours and aliases and the inference
    options come from the configuration. Limits of ``component_entropy`` are those of the configuration, but none is
    stricter than what the weights were found to be sure of when they were trained.

    Raises:
        CheckpointError: if the weights segment other labels, or expect other channels or another order of channels,
            than configured.
    """
    trained = checkpoint.preset
    if trained is None:
        return configured
    if trained.label_indices != configured.label_indices:
        raise CheckpointError(
            f"the weights segment {trained.label_indices}, but {configured.name!r} has {configured.label_indices}"
        )
    if (had := [c.name for c in trained.channels]) != (wanted := [c.name for c in configured.channels]):
        raise CheckpointError(
            f"the weights take {', '.join(had) or 'one image'} as channels, in this order, "
            f"but {configured.name!r} has {', '.join(wanted) or 'one image'}"
        )
    asked, known = configured.inference.component_entropy, dict(trained.inference.component_entropy)
    limits = {name: max(limit, known.get(name, 0.0)) for name, limit in asked}
    served = {"name": configured.name, "labels": configured.labels, "inference": configured.inference}
    return trained.model_copy(update=served).with_component_entropy(limits)
