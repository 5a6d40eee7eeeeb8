"""The versions of a preset's weights: immutable folders of weights with a description, and a pointer to the live
version.

    model/<preset>/shipped.pt, shipped.json   comes with the project; never written, never removed
    model/<preset>/v0001/weights.pt           a version that a run or an upload made
                         version.json         description: preset, recipe, data, scores, parent, SHA-256 ...
    model/<preset>/live.json                  names the live version

A version is written into a temporary folder, which is renamed when it is complete; then the pointer is replaced. If the
writer is killed at any moment, a reader sees either the previous or the new version.
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from lib.configs.preset import Preset
from lib.errors import CheckpointError, NotFoundError, TrainingError
from lib.models.weights import LIVE_FILE, SHIPPED, VERSION_FILE, VERSION_NAME, WEIGHTS_FILE, read_live
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.layouts import StateDict
from lib.storage.files import sha256_of
from lib.storage.json_files import read_json, write_json

logger = logging.getLogger("unetr.publish")

REPORT_FILE = "report.html"
STAGING = ".staging-"
FIRST_YEAR, LAST_YEAR = 1970, 9998
Status = Literal["shipped", "published", "rejected", "unproven", "damaged"]
Files = Mapping[str, Callable[[str], str]]
WriteWeights = Callable[[Path, str, str], None]


class _Scores(BaseModel):
    """Dice on held-out cases."""

    model_config = ConfigDict(strict=True, extra="allow")

    mean_dice: float | None = None
    dice: dict[str, float | None] | None = None
    per_case: dict[str, float | None] | None = None


class _Details(BaseModel):
    """The fields of ``version.json`` on which other code relies."""

    model_config = ConfigDict(strict=True, extra="allow")

    status: str
    sha256: str
    created: str
    parent: str | None = None
    held_out: _Scores | None = None
    held_out_before: _Scores | None = None
    label_digests: dict[str, str] | None = None
    split: dict[str, list[str]] | None = None
    never_learnt: list[str] | None = None

    @field_validator("created")
    @classmethod
    def _check_time(cls, value: str) -> str:
        if not FIRST_YEAR <= datetime.datetime.fromisoformat(value).year <= LAST_YEAR:
            raise ValueError("a time that no server can have had")
        return value


class _ShippedDetails(BaseModel):
    """The fields of ``shipped.json`` on which other code relies."""

    model_config = ConfigDict(strict=True, extra="allow")

    held_out: _Scores | None = None
    cross_validated: _Scores | None = None


@dataclass(frozen=True)
class Version:
    """One version of a preset's weights.

    Attributes:
        name: ``shipped``, or ``v0001`` and so on.
        folder: folder of its files.
        weights: file of its weights.
        details: its description, from ``version.json``.
        damage: why the description cannot be read; empty if ``version.json`` is valid.
    """

    name: str
    folder: Path
    weights: Path
    details: Mapping[str, Any]
    damage: str = ""

    @property
    def status(self) -> Status:
        """Whether and how the version may be served.

        ``published`` and ``shipped`` versions may be served. A ``rejected`` version did not pass the gate. For an
        ``unproven`` version there was no case to judge it, so that a person has to decide. A ``damaged`` version has no
        readable description.
        """
        if self.damage:
            return "damaged"
        if self.name == SHIPPED:
            return "shipped"
        status = self.details["status"]
        return status if status in ("published", "unproven") else "rejected"

    @property
    def compared(self) -> bool:
        """Whether it was compared with the weights that were live before; true for the shipped version."""
        return self.name == SHIPPED or bool(self.details.get("compared"))

    @property
    def number(self) -> int:
        """Number by which versions are ordered in time; 0 for the shipped one."""
        return 0 if self.name == SHIPPED else int(self.name[1:])

    @property
    def report(self) -> Path | None:
        """The HTML report of its training; None for weights that were trained elsewhere."""
        file = self.folder / REPORT_FILE
        return file if self.name != SHIPPED and file.is_file() else None

    @property
    def parent(self) -> str:
        """The version that was live when this one was made; ``pretrained`` or empty if there was none."""
        return str(self.details.get("parent", ""))


class VersionStore:
    """The versions of one preset.

    Args:
        folder: ``model/<preset>``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self) -> list[Version]:
        """All versions, oldest first."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        versions = [self._read(name) for name in names if VERSION_NAME.fullmatch(name)]
        shipped = [self._read(SHIPPED)] if (self.folder / "shipped.pt").is_file() else []
        return shipped + sorted(versions, key=lambda version: version.number)

    def get(self, name: str) -> Version:
        """The version with this name.

        Raises:
            NotFoundError: naming the existing versions.
        """
        version = next((version for version in self.list() if version.name == name), None)
        if version is None:
            raise NotFoundError("version", name[:200], [version.name for version in self.list()])
        return version

    def live(self) -> Version | None:
        """The live version; None if there is none.

        Raises:
            CheckpointError, NotFoundError: if the pointer is damaged, or if its version does not exist.
        """
        name = read_live(self.folder)
        return None if name is None else self.get(name)

    def add(
        self,
        status: Status,
        weights: StateDict,
        preset: Preset,
        details: Mapping[str, Any],
        files: Files | None = None,
    ) -> Version:
        """Store a version, and make it live if it is ``published``.

        Args:
            status: ``published``, ``rejected`` or ``unproven``.
            weights: state dict.
            preset: the preset with which they were trained.
            details: data for ``version.json``: ``parent`` and other provenance.
            files: additional files: their names, and a function that makes the text of each from the version's name.
        """

        def write(path: Path, name: str, created: str) -> None:
            write_checkpoint(path, Checkpoint(weights, preset, {"version": name, "created": created}))

        known = {"preset": preset.model_dump(mode="json"), "labels": preset.label_indices}
        return self.add_file(status, write, known | dict(details), files)

    def add_file(
        self, status: Status, write: WriteWeights, details: Mapping[str, Any], files: Files | None = None
    ) -> Version:
        """Store a version whose weights file has any format, and make it live if it is ``published``.

        Args:
            status: ``published``, ``rejected`` or ``unproven``.
            write: writes the weights file; called with its path, the version's name and the time.
            details, files: see :meth:`add`.
        """
        version = self._add(write, dict(details) | {"status": status}, files or {})
        if status == "published":
            self._point_to(version.name)
        return version

    def publish(
        self, weights: StateDict, preset: Preset, details: Mapping[str, Any], files: Files | None = None
    ) -> Version:
        """Store a version and make it live; for the arguments see :meth:`add`."""
        return self.add("published", weights, preset, details, files)

    def reject(
        self, weights: StateDict, preset: Preset, details: Mapping[str, Any], files: Files | None = None
    ) -> Version:
        """Store a version that is not live; for the arguments see :meth:`add`."""
        return self.add("rejected", weights, preset, details, files)

    def rollback(self, name: str, rejected: bool = False, by: str = "") -> Version:
        """Make a version live at a person's request.

        Args:
            name: name of the version.
            rejected: whether a version that did not pass the gate is allowed.
            by: name of the person.

        Raises:
            NotFoundError: if there is no such version.
            TrainingError: if it did not pass the gate.
            CheckpointError: if its weights have changed since they were stored.
        """
        version = self.get(name)
        if version.damage:
            raise CheckpointError(f"version {name!r} is damaged and is not served: {version.damage}")
        if version.status == "rejected" and not rejected:
            raise TrainingError(
                f"version {name!r} was rejected and is not served, unless with rejected=true: "
                f"{version.details.get('reason')}"
            )
        if sha256_of(version.weights) != version.details.get("sha256"):
            raise CheckpointError(f"the weights of version {name!r} are damaged: their SHA-256 is another one")
        self._point_to(name, by)
        return version

    def withdraw(self) -> str:
        """Make the previous version live again: the parent of the live version, or the preset's initial weights.

        Returns:
            The name of the version that is live now; empty for none.

        Raises:
            TrainingError: if no published version is live.
        """
        live = self.live()
        if live is None or live.name == SHIPPED:
            raise TrainingError("the weights in use are not published ones, and stay")
        whole = [version.name for version in self.list() if not version.damage]
        if live.parent in whole:
            return self.rollback(live.parent, rejected=True).name  # it has been served before
        (self.folder / LIVE_FILE).unlink()
        return ""

    def prune(self, keep: int) -> tuple[str, ...]:
        """Remove old versions, except the live one, its parent and the newest ones.

        Args:
            keep: number of published, of rejected and of unproven versions to keep.

        Returns:
            Names of the removed versions.
        """
        try:
            live = self.live()
        except (CheckpointError, NotFoundError) as error:
            logger.error("%s: no version is removed while it is not known which one is served: %s", self.folder, error)
            return ()
        spared = {live.name, live.parent} if live is not None else set()
        removed = []
        for status in ("published", "rejected", "unproven"):
            versions = [version for version in self.list() if version.status == status]
            for version in versions[: -max(1, keep)]:
                if version.name not in spared:
                    _remove(version.folder)
                    removed.append(version.name)
        return tuple(removed)

    def _read(self, name: str) -> Version:
        folder = self.folder if name == SHIPPED else self.folder / name
        side_car, weights = (SHIPPED + ".json", "shipped.pt") if name == SHIPPED else (VERSION_FILE, WEIGHTS_FILE)
        check = check_shipped_details if name == SHIPPED else check_details
        try:
            details = read_json(folder / side_car)
            return Version(name, folder, folder / weights, check(details))
        except (OSError, ValueError) as error:
            if name == SHIPPED and isinstance(
                error, FileNotFoundError
            ):  # weights that were copied there without a description
                return Version(name, folder, folder / weights, {"sha256": sha256_of(folder / weights)})
            return Version(name, folder, folder / weights, {}, f"{side_car} cannot be read: {error}")

    def _add(self, write: WriteWeights, details: dict[str, Any], files: Files) -> Version:
        self._remove_left_overs()
        number = max((version.number for version in self.list()), default=0) + 1
        staging = self.folder / f"{STAGING}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        try:
            while True:
                name = f"v{number:04d}"
                _write(staging, name, write, details, files)
                if _take_name(staging, self.folder / name):
                    break
                number += 1  # another process took this number
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        logger.info("%s version %s in %s", details["status"], name, self.folder)
        return self._read(name)

    def _point_to(self, name: str, by: str = "") -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / LIVE_FILE, {"version": name, "since": now()} | ({"served_by": by} if by else {}))
        logger.info("%s serves %s", self.folder.name, name)

    def _remove_left_overs(self) -> None:
        """Remove the folders of versions whose writer was killed."""
        for path in self.folder.glob(f"{STAGING}*"):
            if not psutil.pid_exists(int(path.name.removeprefix(STAGING).split("-")[0])):
                shutil.rmtree(path, ignore_errors=True)


def check_details(details: Any) -> dict[str, Any]:
    """The validated fields of ``version.json``.

    Raises:
        ValueError: naming the invalid field.
    """
    return _checked(_Details, details)


def check_shipped_details(details: Any) -> dict[str, Any]:
    """The validated fields of ``shipped.json``, of which there are fewer."""
    return _checked(_ShippedDetails, details)


def _checked(model: type[BaseModel], details: Any) -> dict[str, Any]:
    try:
        model.model_validate(details)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "it"
        missing = problem["type"] == "missing"
        raise ValueError(f"{where} is missing" if missing else f"{where} is {problem['input']!r:.80}") from error
    return dict(details)


def now() -> str:
    """The current UTC time in ISO format, in whole seconds."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _write(folder: Path, name: str, write: WriteWeights, details: Mapping[str, Any], files: Files) -> None:
    created = now()
    write(folder / WEIGHTS_FILE, name, created)
    summary = {"version": name, "created": created, "sha256": sha256_of(folder / WEIGHTS_FILE)}
    write_json(folder / VERSION_FILE, summary | dict(details))
    for file, text_of in files.items():
        (folder / file).write_text(text_of(name), encoding="utf-8")


def _take_name(staging: Path, target: Path) -> bool:
    """Rename a complete folder to its final name; False if the name is taken."""
    if target.exists():
        return False
    try:
        staging.rename(target)
    except OSError:
        if target.exists():
            return False
        raise
    for path in target.iterdir():
        path.chmod(0o444)
    return True


def _remove(folder: Path) -> None:
    """Remove a version; its name goes first, so that nobody sees half of it."""
    leaving = folder.with_name(f"{STAGING}{os.getpid()}-{folder.name}")
    folder.rename(leaving)
    for path in leaving.iterdir():
        path.chmod(0o644)
    shutil.rmtree(leaving)
