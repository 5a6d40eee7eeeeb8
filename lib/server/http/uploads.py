"""Receives files from clients into temporary folders that are always removed, and refuses dangerous files.

A few kilobytes can expand to gigabytes, so the header is checked before any voxel is read.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any

import anyio
import anyio.to_thread
from fastapi import UploadFile
from fastapi.routing import APIRoute
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from lib.errors import InputError
from lib.imagefiles.header import ImageHeader
from lib.imagefiles.reading import BYTES_A_VOXEL, find_header
from lib.server.http.errors import TooLargeError
from lib.server.http.names import safe_file_name

MIB = 2**20
# Of each uploaded file so much is kept in memory before it goes to the disk; a request may have a thousand.
SPOOLED_BYTES = 64 * 1024
MOST_FILES = 20_000
MOST_TEXT_FIELDS = 20
"""Text fields of one form, each of up to a mebibyte and kept in memory; no route has more than three."""
PREFIX = "unetr-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed in any case."""
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@asynccontextmanager
async def temporary_folder_beside_loop() -> AsyncIterator[Path]:
    """A temporary folder for coroutines, created and removed in a thread, since removing large files takes time."""
    made = await anyio.to_thread.run_sync(lambda: tempfile.mkdtemp(prefix=PREFIX))
    try:
        yield Path(made)
    finally:
        with anyio.CancelScope(shield=True):  # also if the client has disconnected
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(made, ignore_errors=True))


def spool_little() -> None:
    """Have uploads go to temporary files early, for all of this process: Starlette keeps a mebibyte of each file."""
    MultiPartParser.spool_max_size = SPOOLED_BYTES


class FormRoute(APIRoute):
    """A route whose forms have at most :data:`MOST_TEXT_FIELDS` text fields, where Starlette takes 1,000.

    FastAPI's own ``form_limits`` needs Python 3.11.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI; the handler receives a request with the limit."""
        handle = super().get_route_handler()

        async def handle_limited(request: Request) -> Response:
            return await handle(_FormRequest(request.scope, request.receive))

        return handle_limited


class _FormRequest(Request):
    def form(self, *, max_fields: float = MOST_TEXT_FIELDS, **limits: Any) -> Any:
        """See Starlette."""
        return super().form(max_fields=max_fields, **limits)


def receive(upload: UploadFile, folder: Path, otherwise: str = "image.nii.gz") -> Path:
    """Copy an upload into ``folder``, with a safe form of its name."""
    path = folder / safe_file_name(upload.filename, otherwise)
    upload.file.seek(0)
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file, MIB)
    return path


def check_header(path: Path, unpacked_limit_mib: int) -> ImageHeader | None:
    """Refuse a file whose header requires too much memory, refers to another file, or has an unsupported format.

    Returns:
        The header; None for DICOM, which its own reader checks.

    Raises:
        FileKindError: for an unsupported format.
        ImageError: if the header is damaged or refers to another file.
        TooLargeError: if the voxels exceed the limit.
    """
    header = None if path.suffix.lower() == ".dcm" else find_header(path)
    if header is not None:
        check_unpacked_size(header.voxel_count * BYTES_A_VOXEL, unpacked_limit_mib, path.name)
    return header


def check_unpacked_size(size_bytes: int, limit_mib: int, name: str) -> None:
    """Refuse a file that is too large after decompression.

    Raises:
        TooLargeError: naming both sizes.
    """
    if size_bytes > limit_mib * MIB:
        raise TooLargeError(
            f"{name!r} is {math.ceil(size_bytes / MIB)} MiB once it is unpacked; valid: at most {limit_mib} MiB"
        )


def unpack(archive: Path, folder: Path, unpacked_limit_mib: int) -> None:
    """Extract the files of a ZIP archive into one folder with numbers as names, since a DICOM series needs no names.

    Raises:
        InputError: if it is not a ZIP archive, is damaged, or has too many files.
        TooLargeError: as soon as the extracted size exceeds the limit, whatever the archive's directory states.
    """
    left = unpacked_limit_mib * MIB
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = [entry for entry in zipped.infolist() if not entry.is_dir()]
            if len(entries) > MOST_FILES:
                raise InputError(f"{archive.name!r} holds {len(entries)} files; valid: at most {MOST_FILES}")
            for number, entry in enumerate(entries):
                target = folder / f"{number:05d}-{safe_file_name(entry.filename, 'file')}"
                with zipped.open(entry) as source:
                    left -= _copy_at_most(source, target, left, archive.name, unpacked_limit_mib)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive.name!r} is not a ZIP archive that can be read: {error}") from error


def _copy_at_most(source: IO[bytes], target: Path, most: int, name: str, limit_mib: int) -> int:
    copied = 0
    with target.open("wb") as file:
        while block := source.read(MIB):
            copied += len(block)
            if copied > most:
                raise TooLargeError(f"{name!r} unpacks to more than {limit_mib} MiB; valid: at most that")
            file.write(block)
    return copied
