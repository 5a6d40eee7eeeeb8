from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi.routing import APIRoute

from lib.server import app
from lib.server.http.auth import Authenticator, Role
from lib.server.http.errors import ForbiddenError, UnauthorizedError
from lib.server.http.tokens import WatchedTokens, add_token

# what clients ask before they have a token, and what holds nothing
OPEN = {"/healthz", "/readyz", "/auth/", "/auth/token", "/ohif/{path:path}", "/ohif/app-config.js"}
OPEN |= {"/docs", "/favicon.ico", "/page/login", "/page/logout"}


def routes() -> Iterator[APIRoute]:
    for router in app.ROUTERS:
        yield from (route for route in router.routes if isinstance(route, APIRoute))


def test_every_route_asks_for_a_role_but_for_the_open_ones() -> None:
    unguarded = {
        route.path
        for route in routes()
        if not any(d.call.__qualname__.startswith(("at_least", "page_user")) for d in route.dependant.dependencies)
    }
    assert unguarded == OPEN


def test_everybody_may_do_everything_without_tokens() -> None:
    assert Authenticator(None, openid=False).identify(None).role is Role.ADMIN


@pytest.fixture
def with_tokens(tmp_path: Path) -> tuple[Authenticator, str]:
    token = add_token(tmp_path / "tokens.yaml", "anna", "reviewer")
    return Authenticator(WatchedTokens(tmp_path / "tokens.yaml"), openid=False), token


def test_token_names_its_user_and_role(with_tokens: tuple[Authenticator, str]) -> None:
    authenticator, token = with_tokens
    for header in (f"Bearer {token}", f"bearer  {token} "):
        user = authenticator.identify(header)
        assert (user.name, user.role) == ("anna", Role.REVIEWER)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic {token}", "{token}"])
def test_anything_else_is_refused(with_tokens: tuple[Authenticator, str], header: str | None) -> None:
    authenticator, token = with_tokens
    with pytest.raises(UnauthorizedError) as refused:
        authenticator.identify(header.replace("{token}", token) if header else header)
    assert token not in str(refused.value) and "wrong" not in str(refused.value)


@pytest.fixture
def provider() -> rsa.RSAPrivateKey:
    """An OpenID provider's key."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def trusting(provider: rsa.RSAPrivateKey) -> Authenticator:
    """What asks for OpenID tokens, with the provider's public key as MONAI Label would fetch it."""
    public = provider.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Authenticator(None, openid=True, public_key=lambda _: public.decode())


def claims(*roles: str, seconds: float = 60) -> dict[str, object]:
    return {"preferred_username": "otto", "realm_access": {"roles": list(roles)}, "exp": time.time() + seconds}


def test_openid_token_names_user_and_highest_role(provider: rsa.RSAPrivateKey) -> None:
    token = jwt.encode(claims("monailabel-user", "monailabel-reviewer", "other"), provider, "RS256")
    user = trusting(provider).identify(f"Bearer {token}")
    assert (user.name, user.role) == ("otto", Role.REVIEWER)


def test_openid_token_that_is_not_valid_is_refused(provider: rsa.RSAPrivateKey) -> None:
    authenticator = trusting(provider)
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for token in (
        jwt.encode(claims("monailabel-admin", seconds=-60), provider, "RS256"),
        jwt.encode(claims("monailabel-admin"), stranger, "RS256"),
        jwt.encode(claims("monailabel-admin"), "x" * 64, "HS256"),
        jwt.encode(claims("monailabel-admin"), None, "none"),
    ):
        with pytest.raises(UnauthorizedError):
            authenticator.identify(f"Bearer {token}")


def test_openid_user_without_a_role_of_ours_is_refused(provider: rsa.RSAPrivateKey) -> None:
    token = jwt.encode(claims("other"), provider, "RS256")
    with pytest.raises(ForbiddenError, match="'otto' has none of this server's roles"):
        trusting(provider).identify(f"Bearer {token}")
