"""``/ohif/``: the OHIF viewer in MONAI Label's package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from monailabel.utils.others.generic import get_mime_type

from lib.datastore.series import SeriesDatastore
from lib.errors import NotFoundError
from lib.server.dependencies import PresentedDep, StoreDep
from lib.server.http.auth import AsUser, AuthenticatorDep
from lib.server.pages.drawing import base_of
from lib.server.pages.sign_in import page_user
from lib.server.pages.viewer_files import adapted
from lib.server.stock import STATIC_FILES

router = APIRouter(prefix="/ohif", tags=["Others"])

FOLDER = (STATIC_FILES / "ohif").resolve()
CONFIGURATION = Path(__file__).parents[1] / "pages" / "viewer" / "app-config.js"


@router.get("/app-config.js", include_in_schema=False)
def configuration() -> FileResponse:
    """The viewer's configuration, with brush, eraser and Submit in its MONAI Label mode."""
    return FileResponse(CONFIGURATION, media_type="text/javascript", headers={"Cache-Control": "no-cache"})


@router.get("/series", include_in_schema=False)
def named_series(store: StoreDep, presented: PresentedDep, user: AsUser, study: str) -> dict[str, Any]:
    """The series of a study to open: the one that a strategy handed out last, or "" if there is none.

    OHIF's panel opens the study of the next sample, in which any of several series may come first. If OHIF cannot show
    the series, its regular series is named, even if the study has only one image; ``regular`` has the descriptions of
    the regular series by the UIDs of their sources.
    """
    regular = presented.regular
    handed_out = {uid: last_handed_out(store, uid) for uid, info in store.series().items() if info.study == study}
    newest = max(handed_out, key=lambda uid: handed_out[uid], default="")
    named = newest if handed_out.get(newest) else ""
    if newest and (named or len(handed_out) == 1):
        named = regular.uid(newest) or named
    descriptions = {uid: str(regular.describe(uid).SeriesDescription) for uid in regular.sources(study)}
    return {"SeriesInstanceUID": named, "regular": descriptions}


def last_handed_out(store: SeriesDatastore, image: str) -> float:
    """Time at which a strategy last chose an image, in seconds since 1970; 0 for never."""
    strategies = store.get_image_info(image).get("strategy", {})
    return max((float(entry.get("ts", 0)) for entry in strategies.values()), default=0)


@router.get("/{path:path}", include_in_schema=False)
async def viewer(request: Request, authenticator: AuthenticatorDep, path: str) -> Response:
    """A file of the viewer; the viewer's own routes, which are not files, return its first page.

    An unknown user is redirected to the sign-in, since the viewer itself asks for no token, and its requests carry the
    cookie.
    """
    file = await anyio.to_thread.run_sync(viewer_file, path)
    if file.name == "index.html":
        await page_user(request, authenticator)
    return await anyio.to_thread.run_sync(send, file, base_of(request))


def viewer_file(path: str) -> Path:
    """The file of the viewer for an address.

    Raises:
        NotFoundError: if the viewer is not installed.
    """
    file = FOLDER / "index.html"
    if path and "\0" not in path:
        wanted = (FOLDER / path).resolve()
        file = wanted if wanted.is_relative_to(FOLDER) and wanted.is_file() else file
    if not file.is_file():
        raise NotFoundError("viewer file", path[:200])
    return file


def send(file: Path, base: str) -> Response:
    """A file of the viewer, adapted to this server if necessary."""
    content = adapted(file, base)
    if content is None:
        return FileResponse(file, media_type=get_mime_type(str(file)))
    return Response(content, media_type=get_mime_type(str(file)), headers={"Cache-Control": "no-cache"})
