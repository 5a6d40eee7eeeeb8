"""Where a preset's weights are: the live version, else pretrained, else shipped."""

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
        name = read_json(folder / LIVE_FILE)["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder.name}/{LIVE_FILE} cannot be used: {error}") from error
    if not isinstance(name, str) or not (name == SHIPPED or VERSION_NAME.fullmatch(name)):
        raise CheckpointError(f"{folder.name}/{LIVE_FILE} names the version {name!r}; valid: {SHIPPED}, v0001, ...")
    return name


def read_details(path: Path) -> dict[str, Any]:
    """What is known of a version, from its ``version.json``; empty where that is missing or damaged."""
    return read_object(path)


def damage_of(weights: Path) -> str:
    """What is wrong with a version's file of weights, in a sentence; empty where it is what was kept.

    A file that has not changed is looked at once.
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
    """Refuse weights that do not fit the network that they say they are of.

    Raises:
        CheckpointError: naming what does not fit.
    """
    if checkpoint.preset is not None:
        with torch.device("meta"):  # takes no memory
            network = build_unetr(checkpoint.preset)
        fitting(checkpoint.model, network)


def _number(name: object) -> int:
    """The number of a version's name; 0 for any other."""
    return int(name[1:]) if isinstance(name, str) and VERSION_NAME.fullmatch(name) else 0


class WeightsLocator:
    """Knows where the weights of one preset can be.

    Args:
        folder: ``model/<preset>``: ``shipped.pt`` comes with the project, training adds a folder a version, and
            ``live.json`` names the one that is served.
        pretrained: path or URL of weights of one's own.

    Attributes:
        problem: why the weights that were found last are not those that should be served; empty where they are.
    """

    def __init__(self, folder: Path, pretrained: str | None = None) -> None:
        self.folder = folder
        self.shipped = folder / "shipped.pt"
        self._pretrained = pretrained
        self.problem = ""

    def find(self) -> WeightsFile | None:
        """The live version; where there is none, pretrained weights (downloaded if it is a URL), or the shipped ones.

        A live version whose weights are damaged or gone is not served: its parent is, or the nearest before it that is
        whole. :attr:`problem` and the log say so.

        Raises:
            CheckpointError: when there are damaged weights only, or pretrained ones are named but are not there.
        """
        file, problem = self._search()
        if problem and problem != self.problem:
            logger.error("%s: %s; served instead: %s", self.folder.name, problem, file.version if file else "nothing")
        self.problem = problem
        if file is None and problem:
            raise CheckpointError(f"{self.folder.name}: {problem}")
        return file

    def _search(self) -> tuple[WeightsFile | None, str]:
        """The weights to serve, and what is wrong with those that should be."""
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
        """The version that was served before another one: its parent, or else the newest published one before it."""
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
        CheckpointError: when the weights segment other labels than configured, or take other channels or another order.
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
    served = {"name": configured.name, "labels": configured.labels, "inference": configured.inference}
    return trained.model_copy(update=served)
