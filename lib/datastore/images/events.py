"""What happens to files in the folders of images and labels, told by the operating system."""

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
"""Not that a file was opened or read: the server itself does that all the time."""


class Observer(Protocol):
    """The part of watchdog's observer interface that is used here."""

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
    """Passes on that files of certain endings came, changed or went.

    MONAI Label's own handler compares every event with a dozen patterns, also those of files that are only read, which
    takes a tenth of a busy server's time.

    Args:
        endings: of images and labels, as ``.nii.gz``.
        look: called when a file is another one, or gone.
        follow: called when a file got its name that this server or another one had written.
    """

    def __init__(self, endings: Collection[str], look: Callable[[], None], follow: Callable[[], None]) -> None:
        self._endings = tuple(ending.lower() for ending in endings)
        self._look, self._follow = look, follow

    def dispatch(self, event: FileSystemEvent) -> None:
        """As watchdog's."""
        came, went = str(event.dest_path), str(event.src_path)
        if not (came.lower().endswith(self._endings) or went.lower().endswith(self._endings)):
            return
        if went.endswith(PARTIAL):
            self._follow()
        else:
            self._look()


def listen(observer: Observer, handler: FolderEvents, images: str, labels: str) -> None:
    """Have an observer tell of the images directly in a folder and of the labels below another, and of nothing else."""
    observer.unschedule_all()
    observer.schedule(handler, images, event_filter=HEARD)
    observer.schedule(handler, labels, recursive=True, event_filter=HEARD)


class CaseFolderEvents(FileSystemEventHandler):
    """Passes on that files of certain endings in the folders of cases, or such folders, came, changed or went.

    Args:
        studies: in which the folders of cases lie.
        endings: of images, as ``.nii.gz``.
        look: called then.
    """

    def __init__(self, studies: Path, endings: Collection[str], look: Callable[[], None]) -> None:
        self._studies, self._look = studies, look
        self._endings = tuple(ending.lower() for ending in endings)

    def dispatch(self, event: FileSystemEvent) -> None:
        """As watchdog's."""
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
    """Have an observer tell of the folders of cases in the studies."""
    observer.schedule(handler, str(studies), recursive=True, event_filter=HEARD)
