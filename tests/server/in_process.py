"""A route answers in this process: no server, no app, no studies; only the services that it asks for are handed in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI

from lib.server.http.auth import Authenticator, get_authenticator
from lib.server.http.errors import register_error_handlers


class InProcess:
    """An API of one router.

    Args:
        router: the routes.
        services: what stands in place of each dependency, such as ``{get_leases: leases}``.
        authenticator: who may do what; everybody everything unless given.
    """

    def __init__(
        self,
        router: APIRouter,
        services: Mapping[Callable[..., Any], Any],
        authenticator: Authenticator | None = None,
    ) -> None:
        self.app = FastAPI()
        self.app.include_router(router)
        register_error_handlers(self.app)
        known = {get_authenticator: authenticator or Authenticator(None, openid=False), **services}
        for dependency, service in known.items():
            self.app.dependency_overrides[dependency] = _returning(service)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())


def _returning(service: Any) -> Callable[[], Any]:
    return lambda: service
