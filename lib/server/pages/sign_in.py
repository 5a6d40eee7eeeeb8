"""Sign-in with a browser: the token is kept in a cookie, which no script can read and no other site can send."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from lib.server.http.auth import COOKIE, AuthenticatorDep, User, user_of
from lib.server.http.errors import UnauthorizedError
from lib.server.pages.drawing import base_of, draw

router = APIRouter(prefix="/page", include_in_schema=False)

SECONDS_SIGNED_IN = 12 * 3600
LONGEST_TOKEN = 4096


@router.get("/login")
def login_page(request: Request) -> HTMLResponse:
    """The sign-in page, which asks for the token."""
    return draw(request, "login.html", None, refused=False)


@router.post("/login")
def login(
    request: Request, authenticator: AuthenticatorDep, token: Annotated[str, Form(max_length=LONGEST_TOKEN)]
) -> Response:
    """Keep a valid token in a cookie and redirect to the first page."""
    try:
        authenticator.identify_token(token.strip())
    except UnauthorizedError:
        page = draw(request, "login.html", None, refused=True)
        page.status_code = 401
        return page
    answer = RedirectResponse(f"{base_of(request)}/", 303)
    secure = request.url.scheme == "https"
    answer.set_cookie(
        COOKIE, token.strip(), SECONDS_SIGNED_IN, path="/", httponly=True, samesite="strict", secure=secure
    )
    return answer


@router.get("/logout")
def logout(request: Request) -> RedirectResponse:
    """Delete the cookie."""
    answer = RedirectResponse(f"{base_of(request)}/page/login", 303)
    answer.delete_cookie(COOKIE, path="/")
    return answer


async def page_user(request: Request, authenticator: AuthenticatorDep) -> User:
    """The user of a page; an unknown one is redirected to the sign-in.

    Raises:
        HTTPException: 303, to the sign-in.
    """
    try:
        return await user_of(request, authenticator)
    except UnauthorizedError as error:
        raise HTTPException(303, "sign in first", {"Location": f"{base_of(request)}/page/login"}) from error


PageUser = Annotated[User, Depends(page_user)]
