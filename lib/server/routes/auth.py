"""``/auth/``: lets 3D Slicer find out that it needs a token, and get one for a user name and a password."""

from __future__ import annotations

import hmac
from typing import Annotated, Any

import requests
from fastapi import APIRouter, Form
from monailabel.config import settings as stock_settings
from monailabel.endpoints.user.auth import token_uri

from lib.server.http.auth import AsUser, Authenticator, AuthenticatorDep
from lib.server.http.errors import UnauthorizedError

router = APIRouter(prefix="/auth", tags=["Auth"])


@router.get("/", summary="Whether clients need a token")
def enabled(authenticator: AuthenticatorDep) -> dict[str, Any]:
    """Open to everybody, since clients ask before they have a token."""
    return {
        "enabled": authenticator.enabled,
        "client_id": stock_settings.MONAI_LABEL_AUTH_CLIENT_ID,
        "realm": stock_settings.MONAI_LABEL_AUTH_REALM_URI if authenticator.openid else None,
    }


@router.post("/token", summary="Exchange user name and password for a token")
def token(
    authenticator: AuthenticatorDep, username: Annotated[str, Form()], password: Annotated[str, Form()]
) -> dict[str, Any]:
    """With a token file, the password is the token; otherwise the OpenID provider decides."""
    if not authenticator.enabled:
        return {"access_token": None, "token_type": None}
    if is_token_of(authenticator, username, password):
        return {"access_token": password, "token_type": "bearer"}
    if not authenticator.openid:
        raise UnauthorizedError("user name and token do not go together")
    return ask_provider(username, password)


@router.get("/token/valid", summary="Who the token belongs to")
def valid(user: AsUser) -> dict[str, Any]:
    """The user's name and role."""
    return {"username": user.name, "roles": [user.role.name.lower()]}


def is_token_of(authenticator: Authenticator, username: str, token: str) -> bool:
    """Whether a token from the token file belongs to this user."""
    entry = authenticator.tokens.find(token) if authenticator.tokens else None
    return entry is not None and hmac.compare_digest(entry.user.encode(), username.encode())


def ask_provider(username: str, password: str) -> dict[str, Any]:
    """A token from the OpenID provider.

    Raises:
        UnauthorizedError: if it refuses, or cannot be reached.
    """
    form = {
        "client_id": stock_settings.MONAI_LABEL_AUTH_CLIENT_ID,
        "username": username,
        "password": password,
        "grant_type": "password",
    }
    try:
        answer = requests.post(token_uri(), data=form, timeout=stock_settings.MONAI_LABEL_AUTH_TIMEOUT)
        answer.raise_for_status()
        given: dict[str, Any] = answer.json()
    except (requests.RequestException, ValueError) as error:
        raise UnauthorizedError("the OpenID provider gives no token for this user and password") from error
    return given
