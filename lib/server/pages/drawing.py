"""The Jinja2 environment of the pages, and responses with a content security policy."""

from __future__ import annotations

import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib.server.http.auth import Role, User
from lib.server.pages.language import language_for

FOLDER = Path(__file__).parent
ASSETS = FOLDER / "assets"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "Accept-Language, Cookie",
}


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The compiled templates; a missing value is a defect and not rendered as empty text."""
    made = Environment(loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined)
    made.filters["moment"] = moment
    for template in made.list_templates():
        made.get_template(template)
    return made


def moment(text: str) -> str:
    """A time in ISO 8601 in readable form, in UTC.

    >>> moment("2026-11-25T15:00:34.408+00:00")
    '2026-11-25 15:00 UTC'
    """
    when = datetime.datetime.fromisoformat(text)
    return when.astimezone(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def draw(request: Request, template: str, user: User | None, **values: Any) -> HTMLResponse:
    """A page, or a part of one, in the browser's preferred language.

    Args:
        request: the request.
        template: name of a file in ``templates/``.
        user: the user; None before the sign-in.
        values: values of the template.
    """
    text = (
        environment()
        .get_template(template)
        .render(
            t=language_for(request.headers.get("accept-language")),
            base=base_of(request),
            user=user,
            asks_for_tokens=request.app.state.services.authenticator.enabled,
            may_annotate=user is not None and user.role >= Role.ANNOTATOR,
            may_review=user is not None and user.role >= Role.REVIEWER,
            may_administrate=user is not None and user.role >= Role.ADMIN,
            **values,
        )
    )
    return HTMLResponse(text, headers=HEADERS)


def base_of(request: Request) -> str:
    """The prefix of every path of the server (``--root_path``), without a trailing slash."""
    return str(request.scope.get("root_path", "")).rstrip("/")
