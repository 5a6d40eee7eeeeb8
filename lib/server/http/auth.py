"""Who a client is and what it may do.

Three ways, in this order: a token from the token file (``--conf tokens``), MONAI Label's own OpenID settings
(``MONAI_LABEL_AUTH_ENABLE``), and, where neither is set up, everybody may do everything.

3D Slicer asks for a user name and a password and fetches a token with them (``/auth/token``); with a token file the
password is the token. A browser keeps its token in a cookie (``lib.server.pages.sign_in``); other sites' pages cannot
send it, since the cookie is ``SameSite=Strict``, nor call this server at all (``lib.server.http.origins``).
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
# A key that signs must never be read as a shared secret, so the symmetric algorithms are not among these.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")

# Names the scheme in the API's description, so that /docs can send a token. It does not refuse by itself: without a
# token file everybody may come in, and a browser's token is in a cookie.
BEARER = HTTPBearer(
    scheme_name="token",
    description="A token of the token file, or of the OpenID provider. A server without either asks for none.",
    auto_error=False,
)


class Role(IntEnum):
    """What a client may do; each role may do what the ones below it may."""

    USER = 1
    ANNOTATOR = 2
    REVIEWER = 3
    ADMIN = 4


@dataclass(frozen=True)
class User:
    """A client that has been let in.

    Attributes:
        name: who, by the token; the same for all where there are no tokens.
        role: what the client may do.
        address: where it is, where there are no tokens to tell clients apart by.
    """

    name: str
    role: Role
    address: str = ""

    def client(self, client_id: Any) -> str:
        """What this client is called where it matters which of several it is.

        Without tokens that is what it calls itself, at its address: all of 3D Slicer's clients have the same name at
        first.
        """
        return f"{str(client_id or 'anonymous')[:200]}@{self.address}" if self.address else self.name


EVERYBODY = User("admin", Role.ADMIN)


class Authenticator:
    """Tells who a request is from.

    Args:
        tokens: the token file; None for none.
        openid: whether MONAI Label's OpenID settings are on.
        public_key: fetches the provider's key, given its address.
    """

    def __init__(
        self, tokens: WatchedTokens | None, openid: bool, public_key: Callable[[str], str] = get_public_key
    ) -> None:
        self.tokens = tokens
        self.openid = openid
        self._public_key = public_key

    @property
    def enabled(self) -> bool:
        """Whether clients need a token at all."""
        return self.tokens is not None or self.openid

    def identify(self, authorization: str | None) -> User:
        """The user behind an ``Authorization`` header.

        Raises:
            UnauthorizedError: when the header is missing or its token is not valid.
        """
        if not self.enabled:
            return EVERYBODY
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise UnauthorizedError("this server asks for a token: send the header Authorization: Bearer <token>")
        return self.identify_token(token.strip())

    def identify_token(self, token: str) -> User:
        """The user behind a token.

        Raises:
            UnauthorizedError: when it is not valid.
        """
        entry = self.tokens.find(token) if self.tokens else None
        if entry is not None:
            return User(entry.user, Role[entry.role.upper()])
        if self.openid:
            return _user_of_openid(token, self._public_key(stock_settings.MONAI_LABEL_AUTH_REALM_URI))
        raise UnauthorizedError("the token is not valid")


def _user_of_openid(token: str, key: str) -> User:
    """The user in a token that the OpenID provider signed with the private half of ``key``.

    MONAI Label's own check cannot succeed: it decodes without naming the algorithms.
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
    """The dependency of whatever lets clients in."""
    authenticator: Authenticator = request.app.state.services.authenticator
    return authenticator


def current_user(request: Request, authenticator: Authenticator) -> User:
    """The request's user, found once a request.

    Raises:
        UnauthorizedError: when there is no valid token where one is needed.
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
    """As :func:`current_user`, on the event loop; in a thread only where a provider may have to be asked for its key.

    A dependency that is no coroutine is given to a thread, and comes back from there, for each request: with busy
    threads that takes longer than most requests do.
    """
    if authenticator.openid:
        return await anyio.to_thread.run_sync(current_user, request, authenticator)
    return current_user(request, authenticator)


async def is_let_in(request: Request, authenticator: Authenticator) -> bool:
    """Whether a request is from somebody who may use the server, for what strangers may ask too."""
    try:
        await user_of(request, authenticator)
    except (UnauthorizedError, ForbiddenError):
        return False
    return True


AuthenticatorDep = Annotated[Authenticator, Depends(get_authenticator)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]


async def known_to_us(request: Request, authenticator: AuthenticatorDep) -> bool:
    """As :func:`is_let_in`, as a FastAPI dependency."""
    return await is_let_in(request, authenticator)


IsLetIn = Annotated[bool, Depends(known_to_us)]


def at_least(role: Role) -> Callable[..., Awaitable[User]]:
    """A dependency that lets users of ``role`` and above in."""

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
