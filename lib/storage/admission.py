"""Decides which files of a folder may be used: regular files whose content comes from no link to another place."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lib.storage.files import sha256_of

ALLOW = "an administrator can allow its folder (image_roots)"


class Admission:
    """Checks the files of a folder. It is thread-safe.

    Args:
        folder: the folder.
        roots: other folders to which links may point.
    """

    def __init__(self, folder: Path, roots: Iterable[Path] = ()) -> None:
        self._folders = [path.resolve() for path in (folder, *roots)]
        self._lock = threading.Lock()
        self._resolved: dict[tuple[str, int, int], Path] = {}
        self._outside: dict[tuple[int, int, int, int], bool] = {}

    def refusal(self, file: Path) -> str | None:
        """Why a file must not be used, as the end of a sentence that begins with its name; None if it may be used.

        The file is never opened, since opening a FIFO or a device may block for ever.
        """
        try:
            os.fspath(file).encode()
        except UnicodeEncodeError:
            return "has a name that is not UTF-8; rename it"
        return self.refusal_of_place(file)

    def refusal_of_place(self, file: Path) -> str | None:
        """The same check without that of the name."""
        try:
            real, status = self._real(file), file.stat()
        except (OSError, RuntimeError, ValueError) as error:
            return f"cannot be read ({getattr(error, 'strerror', None) or error})"
        if not any(real.is_relative_to(folder) for folder in self._folders):
            return f"lies outside the studies folder; {ALLOW}"
        if not stat.S_ISREG(status.st_mode):
            return "is no regular file"
        if status.st_nlink > 1 and self._has_name_outside(status):
            return f"is a hard link to a file that lies outside the studies folder too; {ALLOW}"
        return None

    def refusal_of_folder(self, folder: Path) -> str | None:
        """Why nothing is read from a folder or written into it, as the end of a sentence that begins with its name."""
        try:
            real = folder.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            return f"cannot be used ({getattr(error, 'strerror', None) or error})"
        if any(real.is_relative_to(own) for own in self._folders):
            return None
        return f"is a link out of the studies folder, and nothing is written there; {ALLOW}"

    def check_folder(self, folder: Path) -> None:
        """Refuse to write into a folder that a link leads to from elsewhere.

        Raises:
            PermissionError: whose ``strerror`` says why.
        """
        if (why := self.refusal_of_folder(folder)) is not None:
            raise PermissionError(errno.EACCES, f"the folder {folder.name!r} {why}", str(folder))

    def _real(self, file: Path) -> Path:
        """The real path of a file; folders are resolved once, until they change."""
        if file.is_symlink():
            return file.resolve(strict=True)
        status = file.parent.stat()
        key = (str(file.parent), status.st_dev, status.st_ino)
        with self._lock:
            if key not in self._resolved:
                self._resolved[key] = file.parent.resolve()
            return self._resolved[key] / file.name

    def _has_name_outside(self, status: os.stat_result) -> bool:
        """Whether a file with several hard links has one outside of the folders; all such files are counted at once."""
        key = _key(status)
        with self._lock:
            if key not in self._outside:
                names = _count_names(self._folders)
                self._outside = {file: count < file[2] for file, count in names.items()}
            return self._outside.get(key, True)


def is_what_was_kept(file: Path, folder: Path, sha256: str) -> bool:
    """Whether a file below a folder is the one that this project wrote.

    A link, or a file with a further hard link, is accepted only with the stored content, so that the content of another
    file is never accepted.

    Args:
        file: a file below ``folder``.
        folder: folder whose own files are regular files.
        sha256: SHA-256 of the stored content, in hexadecimal.
    """
    try:
        real, status = file.resolve(strict=True), file.stat()
        if not stat.S_ISREG(status.st_mode):
            return False
        own = folder.parent.resolve() / folder.name  # the folder itself may be a link
        is_plain = real == own / file.relative_to(folder) and status.st_nlink == 1
        return is_plain or sha256_of(file) == sha256
    except (OSError, RuntimeError):  # missing, or a circular link
        return False


def _key(status: os.stat_result) -> tuple[int, int, int, int]:
    # includes the time of the last inode change, which a new or removed hard link updates
    return status.st_dev, status.st_ino, status.st_nlink, status.st_ctime_ns


def _count_names(folders: Iterable[Path]) -> Counter[tuple[int, int, int, int]]:
    walked = (walk for top in set(folders) for walk in os.walk(top))
    counted: Counter[tuple[int, int, int, int]] = Counter()
    for name in {os.path.join(at, name) for at, _, files in walked for name in files}:
        try:
            status = os.lstat(name)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            counted[_key(status)] += 1
    return counted
