"""``/docs``: the documentation of the API, with its scripts from this server, so that it works without internet
access.
"""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles

from lib.server.pages.drawing import ASSETS, base_of

router = APIRouter(include_in_schema=False)
scripts = StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static")


@router.get("/docs")
def documentation(request: Request) -> HTMLResponse:
    """Swagger UI over ``/openapi.json``."""
    base = base_of(request)
    return get_swagger_ui_html(
        openapi_url=f"{base}/openapi.json",
        title=request.app.title,
        swagger_js_url=f"{base}/docs/scripts/swagger-ui-bundle.js",
        swagger_css_url=f"{base}/docs/scripts/swagger-ui.css",
        swagger_favicon_url=f"{base}/page/assets/icon.svg",
    )


@router.get("/favicon.ico")
def icon() -> FileResponse:
    """The favicon at the path that browsers request by default."""
    return FileResponse(ASSETS / "icon.svg", media_type="image/svg+xml")
