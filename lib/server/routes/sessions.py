"""``/session/``: images that are not part of the studies, stored for an hour."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, UploadFile
from monailabel.utils.sessions import SessionInfo, Sessions
from starlette.responses import Response

from lib.configs.preset import Preset
from lib.datastore.images.sent_series import unite_series
from lib.errors import NotFoundError, ParameterError
from lib.server.dependencies import PresetsDep, ReadersDep, SessionsDep, SettingsDep
from lib.server.downloads import send_file
from lib.server.http.auth import AsUser
from lib.server.http.uploads import FormRoute, check_header, receive, temporary_folder, unpack
from lib.server.work.image_checks import inspect_for_any
from lib.transforms.channel_search import ENDINGS

router = APIRouter(prefix="/session", tags=["Session"], route_class=FormRoute)

logger = logging.getLogger("unetr.server")
ONE_AT_A_TIME = threading.RLock()
"""MONAI Label's sessions are a dictionary beside files: one that another thread removes is half there meanwhile."""

_SESSION_ID = re.compile(r"[0-9a-f-]{36}")


@router.put("/", summary="Keep an image for a while", response_model=None)
async def create_session(
    user: AsUser,
    sessions: SessionsDep,
    presets: PresetsDep,
    settings: SettingsDep,
    readers: ReadersDep,
    files: Annotated[list[UploadFile], File()],
    uncompress: bool = False,
    expiry: int = 0,
) -> dict[str, Any]:
    """Store one image, or the files of one DICOM series or of one case of several sequences.

    Several files are sent as such, or as a ZIP archive with ``uncompress``; sequences are named as in a folder of the
    studies, or are DICOM series that match the channels of a served model.
    """
    limit_mib, served = settings.unpacked_limit_mib, list(presets.values())
    return await readers.beside(lambda: store(sessions, files, uncompress, expiry, limit_mib, served, readers.reading))


@router.get("/{session_id}", summary="What is known of a session, or its image", response_model=None)
def get_session(
    user: AsUser, sessions: SessionsDep, session_id: str, update_ts: bool = False, image: bool = False
) -> dict[str, Any] | Response:
    """The session's times and image; with ``image``, the image file itself."""
    session = find_session(sessions, session_id, update_ts)
    if not image:
        return describe(session)
    path = Path(session.image)
    if not path.is_file():
        raise NotFoundError("single image file in session", session_id)
    return send_file(path)


@router.delete("/{session_id}", summary="Forget a session")
def remove_session(user: AsUser, sessions: SessionsDep, session_id: str) -> dict[str, Any]:
    """Remove a session and its files."""
    with ONE_AT_A_TIME:
        session = find_session(sessions, session_id)
        sessions.remove_session(session_id)
    return describe(session)


def session_image(sessions: Sessions, session_id: str) -> Path:
    """A session's image; each request extends the session.

    Raises:
        NotFoundError: if there is no such session.
    """
    return Path(find_session(sessions, session_id, update=True).image)


def find_session(sessions: Sessions, session_id: str, update: bool = False) -> SessionInfo:
    """A current session.

    Raises:
        NotFoundError: if there is none with this id.
    """
    if not _SESSION_ID.fullmatch(session_id):
        raise NotFoundError("session", session_id[:200])
    with ONE_AT_A_TIME:
        try:
            session = sessions.get_session(session_id, update_ts=False)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            logger.warning("the session %s is damaged: %s", session_id, error)
            session = None
        if session is not None and has_ended(session, time.time()):
            sessions.remove_session(session_id)
            session = None
        if session is None:
            raise NotFoundError("session", session_id)
        return sessions.get_session(session_id, update_ts=True) if update else session


def has_ended(session: SessionInfo, now: float) -> bool:
    """Whether a session has expired: the given number of seconds after its last use, by its file's time.

    The times inside of the file are whole seconds, with which a session of two seconds would last one or two.
    """
    try:
        file = Path(session.path) / "meta.info"
        last = file.stat().st_mtime
        if last > now:  # the clock was set back since
            os.utime(file, (now, now))
    except FileNotFoundError:
        return True
    return bool(session.expiry > 0 and now >= last + session.expiry)


def store(
    sessions: Sessions,
    files: Sequence[UploadFile],
    uncompress: bool,
    expiry: int,
    limit_mib: int,
    presets: Collection[Preset],
    reading: AbstractContextManager[object],
) -> dict[str, Any]:
    """Store uploaded files as a session, if they are an image.

    Args:
        sessions: the store of sessions.
        files: the uploaded files.
        uncompress: whether the one file is a ZIP archive.
        expiry: seconds after which the session expires; at most the server's own limit.
        limit_mib: size limit of a file or an archive after decompression, in MiB.
        presets: presets of which at least one must be able to segment the image.
        reading: held while images are read.

    Raises:
        ImageError: if they are not an image.
        ParameterError, TooLargeError, InputError: if they cannot be decompressed.
    """
    with temporary_folder() as folder:
        received = _gather(files, folder, uncompress, limit_mib)
        with reading:
            image, notes = unite_series(received, folder / "case", presets)
            inspect_for_any(image, list(presets))
        # MONAI Label's own ids tell the time and the machine, and so another session's can be guessed
        session_id, session = sessions.add_session(
            str(image), max(0, min(expiry, sessions.expiry)), session_id=str(uuid.uuid4())
        )
    payload = {"session_id": session_id, "session_info": describe(session)}
    return payload | ({"warnings": list(notes)} if notes else {})


def describe(session: SessionInfo) -> dict[str, Any]:
    """A session as JSON."""
    described: dict[str, Any] = session.to_json()
    return described


def _gather(files: Sequence[UploadFile], folder: Path, uncompress: bool, limit_mib: int) -> Path:
    """One file as it is, several files as a folder, an archive as the folder of its content."""
    series = folder / "series"
    series.mkdir()
    if uncompress:
        if len(files) != 1:
            raise ParameterError("files", len(files), "one ZIP archive, with uncompress=true")
        unpack(receive(files[0], folder, "archive.zip"), series, limit_mib)
        inside = list(series.iterdir())
        received = inside[0] if len(inside) == 1 else series
    elif len(files) == 1:
        received = receive(files[0], folder)
    else:
        for number, file in enumerate(files):
            place = folder / "one"
            place.mkdir(exist_ok=True)
            one = receive(file, place, "file.dcm")
            one.rename(series / f"{number:05d}-{one.name}")
        received = series
    # in a folder, only DICOM files are read
    for path in [received] if received.is_file() else received.iterdir():
        if received.is_file() or path.name.lower().endswith(ENDINGS):
            check_header(path, limit_mib)
    return received
