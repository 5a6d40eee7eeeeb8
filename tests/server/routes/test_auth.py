"""Signing in and the description of it, without a server."""

from __future__ import annotations

from pathlib import Path

from lib.server.app import app
from lib.server.http.auth import Authenticator
from lib.server.http.tokens import WatchedTokens, add_token
from lib.server.routes.auth import router
from tests.server.in_process import InProcess


def test_password_that_is_the_users_token_is_exchanged_for_it(tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens.yaml", "anna", "reviewer")
    api = InProcess(router, {}, Authenticator(WatchedTokens(tmp_path / "tokens.yaml"), openid=False))
    assert api.request("GET", "/auth/").json()["enabled"] is True
    right = api.request("POST", "/auth/token", data={"username": "anna", "password": token})
    assert right.json() == {"access_token": token, "token_type": "bearer"}
    assert api.request("POST", "/auth/token", data={"username": "ben", "password": token}).status_code == 401
    valid = api.request("GET", "/auth/token/valid", headers={"Authorization": f"Bearer {token}"})
    assert valid.json() == {"username": "anna", "roles": ["reviewer"]}
    assert api.request("GET", "/auth/token/valid").status_code == 401


def test_description_of_the_api_says_that_routes_take_a_bearer_token() -> None:
    """So that /docs has its button Authorize; routes that ask for no role name no scheme."""
    document = app.openapi()
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert document["paths"]["/datastore/"]["get"]["security"] == [{"token": []}]
    assert "security" not in document["paths"]["/auth/"]["get"]
