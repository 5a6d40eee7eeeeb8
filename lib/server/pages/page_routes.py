"""``/``: the whole loop on one page, its parts, and the events that say which of them have changed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from lib.errors import NotFoundError
from lib.server.dependencies import ChangesDep
from lib.server.http.auth import User
from lib.server.pages.drawing import draw, environment
from lib.server.pages.job_view import job_view
from lib.server.pages.models_view import models_view
from lib.server.pages.pool_view import activity_view, next_view, pool_view
from lib.server.pages.sign_in import PageUser
from lib.server.pages.system_view import system_view
from lib.server.routes.runs import Policy
from lib.server.services import Parts, Services
from lib.server.work.retraining import Retrainer

router = APIRouter(include_in_schema=False)

VIEWS: dict[str, Callable[[Services, User, Retrainer], Any]] = {
    "pool": lambda parts, user, _policy: pool_view(parts, user),
    "next": lambda parts, _user, _policy: next_view(parts),
    "job": lambda parts, _user, policy: job_view(parts.jobs, parts.train_tasks, policy.words(), policy.notices()),
    "models": lambda parts, _user, _policy: models_view(parts.train_tasks),
    "activity": lambda parts, user, _policy: activity_view(parts, user),
    "system": lambda parts, _user, _policy: system_view(str(parts.instance.studies), parts.metrics, parts.inferences),
}


def prepare(parts: Services) -> None:
    """Load what the first visit would wait for: the templates, and what the models made of the cases.

    The studies are not asked: a PACS that is down must not keep the server from starting.
    """
    environment()
    for knowledge in parts.instance.knowledge_by_preset.values():
        knowledge.score_records()


@router.get("/")
def overview(request: Request, parts: Parts, policy: Policy, user: PageUser) -> HTMLResponse:
    """The page as it is now."""
    return draw(request, "overview.html", user, **{name: view(parts, user, policy) for name, view in VIEWS.items()})


@router.get("/page/events", response_class=EventSourceResponse)
async def events(changes: ChangesDep, user: PageUser) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events ``changed``, each a list of the parts that have."""
    yield ServerSentEvent(comment="listening")
    async for topics in changes.listen():
        yield ServerSentEvent(raw_data=json.dumps(topics), event="changed")


@router.get("/page/{section}")
def part(request: Request, parts: Parts, policy: Policy, user: PageUser, section: str) -> HTMLResponse:
    """One part of the page."""
    if section not in VIEWS:
        raise NotFoundError("part of the page", section[:200], list(VIEWS))
    return draw(request, f"{section}.html", user, **{section: VIEWS[section](parts, user, policy)})
