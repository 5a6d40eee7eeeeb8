"""File system events in the folders of images and labels."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)

from lib.datastore.images.folder import NOT_SCANNED
from lib.storage.files import PARTIAL

HEARD: list[type[FileSystemEvent]] = [
    *(FileCreatedEvent, FileDeletedEvent, FileModifiedEvent, FileMovedEvent),
    *(DirCreatedEvent, DirDeletedEvent, DirMovedEvent),
]
"""Event types to watch, without opening and reading of files, which the server does all the time."""


class Observer(Protocol):
    """The part of watchdog's observer interface that is used."""

    def unschedule_all(self) -> None: ...

    def schedule(
        self,
        event_handler: FileSystemEventHandler,
        path: str,
        *,
        recursive: bool = False,
        event_filter: list[type[FileSystemEvent]] | None = None,
    ) -> object: ...


class FolderEvents(FileSystemEventHandler):
    """Reports that files with certain extensions were created, changed or deleted.

    MONAI Label's own handler compares every event with a dozen patterns, including events of files that are only read,
    which takes a tenth of a busy server's time.

    Args:
        endings: extensions of images and labels, such as ``.nii.gz``.
        look: called when a file was replaced or deleted.
        follow: called when a file written by this server or another one received its final name.
    """

    def __init__(self, endings: Collection[str], look: Callable[[], None], follow: Callable[[], None]) -> None:
        self._endings = tuple(ending.lower() for ending in endings)
        self._look, self._follow = look, follow

    def dispatch(self, event: FileSystemEvent) -> None:
        """Handle an event; watchdog's interface."""
        came, went = str(event.dest_path), str(event.src_path)
        if not (came.lower().endswith(self._endings) or went.lower().endswith(self._endings)):
            return
        if went.endswith(PARTIAL):
            self._follow()
        else:
            self._look()


def listen(observer: Observer, handler: FolderEvents, images: str, labels: str) -> None:
    """Watch the images directly in a folder and the labels below another one, and nothing else."""
    observer.unschedule_all()
    observer.schedule(handler, images, event_filter=HEARD)
    observer.schedule(handler, labels, recursive=True, event_filter=HEARD)


class CaseFolderEvents(FileSystemEventHandler):
    """Reports that case folders, or files with certain extensions in them, were created, changed or deleted.

    Args:
        studies: folder of the case folders.
        endings: extensions of images, such as ``.nii.gz``.
        look: called for each such event.
    """

    def __init__(self, studies: Path, endings: Collection[str], look: Callable[[], None]) -> None:
        self._studies, self._look = studies, look
        self._endings = tuple(ending.lower() for ending in endings)

    def dispatch(self, event: FileSystemEvent) -> None:
        """Handle an event; watchdog's interface."""
        if any(self._is_of_case(path, event.is_directory) for path in (str(event.dest_path), str(event.src_path))):
            self._look()

    def _is_of_case(self, path: str, is_directory: bool) -> bool:
        if not path or not Path(path).is_relative_to(self._studies):
            return False
        below = Path(path).relative_to(self._studies).parts
        if not below or below[0].startswith(".") or below[0] in NOT_SCANNED:
            return False
        return len(below) == 1 if is_directory else len(below) == 2 and path.lower().endswith(self._endings)


def listen_to_folders(observer: Observer, studies: Path, handler: CaseFolderEvents) -> None:
    """Watch the case folders of the studies."""
    observer.schedule(handler, str(studies), recursive=True, event_filter=HEARD)
