"""``/``: the page with all parts of the learning loop, and the events for their updates."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from lib.activelearning.pool_knowledge import PoolKnowledge
from lib.datastore.store import VersionedDatastore
from lib.errors import NotFoundError
from lib.server.dependencies import (
    ChangesDep,
    InferencesDep,
    JobsDep,
    MetricsDep,
    NextCaseDep,
    PresentedDep,
    SettingsDep,
    StoreDep,
    StudiesDep,
    TrainTasksDep,
    VersionedModelsDep,
)
from lib.server.http.auth import User
from lib.server.http.metrics import Metrics
from lib.server.pages.drawing import draw, environment
from lib.server.pages.job_view import job_view
from lib.server.pages.models_view import models_view
from lib.server.pages.pool_view import activity_view, next_view, pool_view
from lib.server.pages.sign_in import PageUser
from lib.server.pages.system_view import system_view
from lib.server.presented.cases import PresentedCases
from lib.server.routes.runs import Policy
from lib.server.tasks import TasksByName, Versioned
from lib.server.work.jobs import Jobs
from lib.server.work.next_case import NextCase
from lib.server.work.queue import InferenceQueue
from lib.server.work.retraining import Retrainer
from lib.trainers.task import UnetrTrainTask

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Overview:
    """The parts of the page, each computed on request."""

    store: VersionedDatastore
    studies: str
    strategy: str
    cases: NextCase
    presented: PresentedCases
    trainers: TasksByName[UnetrTrainTask]
    trained: TasksByName[Versioned]
    jobs: Jobs
    policy: Retrainer
    metrics: Metrics
    inferences: InferenceQueue

    def part(self, section: str, user: User) -> Any:
        """The content of a part of the page for a user.

        Raises:
            NotFoundError: if there is no such part.
        """
        if section not in SECTIONS:
            raise NotFoundError("part of the page", section[:200], list(SECTIONS))
        return SECTIONS[section](self, user)


SECTIONS: Mapping[str, Callable[[Overview, User], Any]] = {
    "pool": lambda page, user: pool_view(page.store, page.cases.inspector, user),
    "next": lambda page, _user: next_view(page.cases, page.strategy, page.presented, page.trainers),
    "job": lambda page, _user: job_view(page.jobs, page.trainers, page.policy.words(), page.policy.notices()),
    "models": lambda page, _user: models_view(page.trainers, page.trained),
    "activity": lambda page, user: activity_view(page.store, user),
    "system": lambda page, _user: system_view(page.studies, page.metrics, page.inferences),
}


async def get_overview(
    store: StoreDep,
    studies: StudiesDep,
    settings: SettingsDep,
    cases: NextCaseDep,
    presented: PresentedDep,
    trainers: TrainTasksDep,
    trained: VersionedModelsDep,
    jobs: JobsDep,
    policy: Policy,
    metrics: MetricsDep,
    inferences: InferencesDep,
) -> Overview:
    """The page's parts, as a FastAPI dependency."""
    strategy = settings.strategy
    return Overview(store, studies, strategy, cases, presented, trainers, trained, jobs, policy, metrics, inferences)


OverviewDep = Annotated[Overview, Depends(get_overview)]


def prepare(pool_knowledge: Mapping[str, PoolKnowledge]) -> None:
    """Load what the first visit needs: the templates, and the stored scores of the cases.

    The studies are not read, so that an unavailable PACS does not delay the start of the server.
    """
    environment()
    for knowledge in pool_knowledge.values():
        knowledge.score_records()


@router.get("/")
def overview(request: Request, page: OverviewDep, user: PageUser) -> HTMLResponse:
    """The current page."""
    return draw(request, "overview.html", user, **{name: page.part(name, user) for name in SECTIONS})


@router.get("/page/events", response_class=EventSourceResponse)
async def events(changes: ChangesDep, user: PageUser) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events ``changed``, each with a list of the changed parts."""
    yield ServerSentEvent(comment="listening")
    async for topics in changes.listen():
        yield ServerSentEvent(raw_data=json.dumps(topics), event="changed")


@router.get("/page/{section}")
def part(request: Request, page: OverviewDep, user: PageUser, section: str) -> HTMLResponse:
    """One part of the page."""
    shown = page.part(section, user)
    return draw(request, f"{section}.html", user, **{section: shown})
