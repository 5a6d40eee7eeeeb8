"""Authentication and authorisation of clients.

There are three ways, in this order: a token from the token file (``--conf tokens``); MONAI Label's own OpenID settings
(``MONAI_LABEL_AUTH_ENABLE``); and, if neither is configured, everybody has all permissions.

3D Slicer asks for a user name and a password and requests a token with them (``/auth/token``); with a token file, the
password is the token. A browser keeps its token in a cookie (``lib.server.pages.sign_in``). Pages of other sites cannot
send it, since the cookie is ``SameSite=Strict``, and cannot call this server at all (``lib.server.http.origins``).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Annotated, Any

import anyio.to_thread
import jwt
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from monailabel.config import settings as stock_settings
from monailabel.endpoints.user.auth import get_public_key

from lib.server.http.errors import ForbiddenError, UnauthorizedError
from lib.server.http.tokens import WatchedTokens

logger = logging.getLogger("unetr.server")

COOKIE = "unetr_token"
# A public key must never be used as a shared secret, so symmetric algorithms are excluded.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")

# Declares the scheme in the API's description, so that /docs can send a token. It does not refuse requests by itself:
# without a token file everybody has access, and a browser's token is in a cookie.
BEARER = HTTPBearer(
    scheme_name="token",
    description="A token of the token file, or of the OpenID provider. A server without either asks for none.",
    auto_error=False,
)


class Role(IntEnum):
    """The permissions of a client; each role includes those of the lower ones."""

    USER = 1
    ANNOTATOR = 2
    REVIEWER = 3
    ADMIN = 4


@dataclass(frozen=True)
class User:
    """An authenticated client.

    Attributes:
        name: user name of the token; the same for all clients without tokens.
        role: role of the user.
        address: address of the client, which distinguishes clients without tokens.
    """

    name: str
    role: Role
    address: str = ""

    def client(self, client_id: Any) -> str:
        """The identity of this client among several.

        Without tokens, it is the client's own name together with its address, since all instances of 3D Slicer have the
        same name by default.
        """
        return f"{str(client_id or 'anonymous')[:200]}@{self.address}" if self.address else self.name


EVERYBODY = User("admin", Role.ADMIN)


class Authenticator:
    """Identifies the user of a request.

    Args:
        tokens: the token file; None for none.
        openid: whether MONAI Label's OpenID settings are enabled.
        public_key: downloads the provider's key from its address.
    """

    def __init__(
        self, tokens: WatchedTokens | None, openid: bool, public_key: Callable[[str], str] = get_public_key
    ) -> None:
        self.tokens = tokens
        self.openid = openid
        self._public_key = public_key

    @property
    def enabled(self) -> bool:
        """Whether clients need a token."""
        return self.tokens is not None or self.openid

    def identify(self, authorization: str | None) -> User:
        """The user of an ``Authorization`` header.

        Raises:
            UnauthorizedError: if the header is missing or its token is invalid.
        """
        if not self.enabled:
            return EVERYBODY
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise UnauthorizedError("this server asks for a token: send the header Authorization: Bearer <token>")
        return self.identify_token(token.strip())

    def identify_token(self, token: str) -> User:
        """The user of a token.

        Raises:
            UnauthorizedError: if it is invalid.
        """
        entry = self.tokens.find(token) if self.tokens else None
        if entry is not None:
            return User(entry.user, Role[entry.role.upper()])
        if self.openid:
            return _user_of_openid(token, self._public_key(stock_settings.MONAI_LABEL_AUTH_REALM_URI))
        raise UnauthorizedError("the token is not valid")


def _user_of_openid(token: str, key: str) -> User:
    """The user of a token that the OpenID provider signed with the private key of ``key``.

    MONAI Label's own check always fails, since it decodes without naming the algorithms.
    """
    try:
        payload = jwt.decode(token, key, algorithms=list(ALGORITHMS), options={"verify_aud": False})
    except jwt.InvalidTokenError as error:
        raise UnauthorizedError(f"the token is not valid: {error}") from error
    name = str(payload.get(stock_settings.MONAI_LABEL_AUTH_TOKEN_USERNAME) or payload.get("sub"))
    return User(name, _highest_role(_claimed_roles(payload), name))


def _claimed_roles(payload: Any) -> list[str]:
    claim = payload
    for part in stock_settings.MONAI_LABEL_AUTH_TOKEN_ROLES.split("#"):
        claim = claim.get(part) if isinstance(claim, dict) else None
    return [str(role) for role in claim] if isinstance(claim, list) else []


def _highest_role(claimed: list[str], name: str) -> Role:
    names = {
        stock_settings.MONAI_LABEL_AUTH_ROLE_USER: Role.USER,
        stock_settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR: Role.ANNOTATOR,
        stock_settings.MONAI_LABEL_AUTH_ROLE_REVIEWER: Role.REVIEWER,
        stock_settings.MONAI_LABEL_AUTH_ROLE_ADMIN: Role.ADMIN,
    }
    roles = [names[role] for role in claimed if role in names]
    if not roles:
        raise ForbiddenError(f"user {name!r} has none of this server's roles: {', '.join(names)}")
    return max(roles)


async def get_authenticator(request: Request) -> Authenticator:
    """The authenticator, as a FastAPI dependency."""
    authenticator: Authenticator = request.app.state.services.authenticator
    return authenticator


def current_user(request: Request, authenticator: Authenticator) -> User:
    """The request's user, identified once for each request.

    Raises:
        UnauthorizedError: if a valid token is required and missing.
    """
    user: User | None = request.scope.get("unetr.user")
    if user is None:
        header, kept = request.headers.get("authorization"), request.cookies.get(COOKIE)
        user = authenticator.identify(header or (f"Bearer {kept}" if kept else None))
        if not authenticator.enabled:
            user = replace(user, address=request.client.host if request.client else "unknown")
        request.scope["unetr.user"] = user
    return user


async def user_of(request: Request, authenticator: Authenticator) -> User:
    """Like :func:`current_user`, on the event loop; a thread is used only if a provider's key has to be downloaded.

    A dependency that is not a coroutine runs in a thread for each request, which with busy threads takes longer than
    most requests.
    """
    if authenticator.openid:
        return await anyio.to_thread.run_sync(current_user, request, authenticator)
    return current_user(request, authenticator)


async def is_let_in(request: Request, authenticator: Authenticator) -> bool:
    """Whether a request has access to the server, for routes that are open to everybody."""
    try:
        await user_of(request, authenticator)
    except (UnauthorizedError, ForbiddenError):
        return False
    return True


AuthenticatorDep = Annotated[Authenticator, Depends(get_authenticator)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]


async def known_to_us(request: Request, authenticator: AuthenticatorDep) -> bool:
    """Like :func:`is_let_in`, as a FastAPI dependency."""
    return await is_let_in(request, authenticator)


IsLetIn = Annotated[bool, Depends(known_to_us)]


def at_least(role: Role) -> Callable[..., Awaitable[User]]:
    """A dependency that requires ``role`` or a higher one."""

    async def check(request: Request, authenticator: AuthenticatorDep, _: Credentials) -> User:
        user = await user_of(request, authenticator)
        if user.role < role:
            message = f"this needs the role {role.name.lower()}; {user.name!r} is {user.role.name.lower()}"
            raise ForbiddenError(message)
        return user

    return check


AsUser = Annotated[User, Depends(at_least(Role.USER))]
AsAnnotator = Annotated[User, Depends(at_least(Role.ANNOTATOR))]
AsReviewer = Annotated[User, Depends(at_least(Role.REVIEWER))]
AsAdmin = Annotated[User, Depends(at_least(Role.ADMIN))]
