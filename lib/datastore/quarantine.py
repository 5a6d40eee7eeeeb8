"""Stores refused files with the reason, so that no annotator's work is lost."""

from __future__ import annotations

import logging
import os
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from lib.datastore.records import suffix_of
from lib.errors import NotFoundError
from lib.storage.admission import Admission, is_what_was_kept
from lib.storage.disk import MIB, make_room
from lib.storage.files import read_blocks, stage, sync_folder, write_durably
from lib.storage.json_files import as_json, read_json

logger = logging.getLogger("unetr.datastore")

DEFAULT_LIMIT_MIB = 2048
_NAME = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{8}")
_SUFFIX = re.compile(r"(\.[A-Za-z0-9]{1,8}){0,2}")


@dataclass(frozen=True)
class Quarantined:
    """A refused file.

    Attributes:
        name: its name in the quarantine.
        file: the file as received.
        reason: the sentence of the refusal.
        details: sender, time, image and further information.
    """

    name: str
    file: Path
    reason: str
    details: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """The record as JSON data for a client."""
        try:
            size = self.file.stat().st_size
        except FileNotFoundError:  # removed, perhaps just now, to make room
            size = 0
        return self.details | {"name": self.name, "file": self.file.name, "size": size, "reason": self.reason}


class Quarantine:
    """A folder of refused files.

    Args:
        folder: folder, which is created with the first file.
        limit_mib: size limit; beyond it, the oldest files are removed.
        admission: judges the folder, which may have become a link.
    """

    def __init__(self, folder: Path, limit_mib: int = DEFAULT_LIMIT_MIB, admission: Admission | None = None) -> None:
        self.folder = folder
        self._admission = admission or Admission(folder.parent)
        self.limit_mib = limit_mib
        self._lock = threading.Lock()

    def keep(self, file: Path, reason: str, details: Mapping[str, Any]) -> Quarantined:
        """Copy a file to the quarantine, with the reason.

        Raises:
            OSError: if it cannot be written.
        """
        self._admission.check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(timezone.utc)
        name = f"{now:%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:8]}"
        suffix = suffix_of(file)
        target = self.folder / f"{name}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
        staged = stage(read_blocks(file), self.folder)
        os.replace(staged.path, target)
        record = {**details, "file": target.name, "sha256": staged.sha256, "at": now.isoformat(timespec="seconds")}
        write_durably(self.folder / f"{name}.json", as_json(record | {"reason": reason}))
        sync_folder(self.folder)
        self._make_room()
        return Quarantined(name, target, reason, record)

    def all(self) -> list[Quarantined]:
        """All refused files, newest first."""
        return list(self._newest_first())

    def newest(self, count: int) -> list[Quarantined]:
        """The newest refused files, newest first; no others are read."""
        return list(islice(self._newest_first(), count))

    def count(self) -> int:
        """Number of refused files."""
        return len(self._names())

    def get(self, name: str) -> Quarantined:
        """The refused file with this name.

        Raises:
            NotFoundError: if there is none with this name.
        """
        path = self.folder / f"{name}.json"
        is_named = _NAME.fullmatch(name) and self._admission.refusal_of_folder(self.folder) is None
        record = self._read(path) if is_named and path.is_file() else None
        if record is None:
            raise NotFoundError("quarantined label", name[:200])
        return record

    def content(self, name: str) -> Path:
        """The content of a refused file.

        Raises:
            NotFoundError: if there is none with this name, if its content is gone, or if it is a link to another file.
        """
        refused = self.get(name)
        if not is_what_was_kept(refused.file, self.folder, str(refused.details.get("sha256", ""))):
            raise NotFoundError("file of quarantined label", name)
        return refused.file

    def _newest_first(self) -> Iterator[Quarantined]:
        records = (self._read(self.folder / name) for name in sorted(self._names(), reverse=True))
        return (one for one in records if one is not None)

    def _names(self) -> list[str]:
        """Names of the side-cars."""
        if not self.folder.is_dir() or self._admission.refusal_of_folder(self.folder) is not None:
            return []
        return [name for name in os.listdir(self.folder) if name.endswith(".json")]

    def _read(self, side_car: Path) -> Quarantined | None:
        try:
            details = read_json(side_car)
            file = self.folder / Path(details["file"]).name
            return Quarantined(side_car.stem, file, str(details.pop("reason")), details)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("quarantine: %s cannot be read: %s", side_car.name, error)
            return None

    def _make_room(self) -> None:
        with self._lock:
            files = sorted(path for path in self.folder.iterdir() if path.is_file())
            newest = sum(path.stat().st_size for path in files[-2:])  # the newest file and its reason are always kept
            for path in make_room([(path,) for path in files[:-2]], self.limit_mib * MIB - newest):
                logger.warning("quarantine: %s removed, since there is more than %d MiB", path.name, self.limit_mib)
