"""``/healthz``, ``/readyz`` and ``/metrics``: for whoever watches over the server."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lib.server.dependencies import (
    LanesDep,
    MetricsDep,
    SettingsDep,
    StoreDep,
    StudiesDep,
    TrainTasksDep,
    WeightsLoadingDep,
)
from lib.server.http.auth import AsUser, IsLetIn
from lib.server.work.problems import (
    device_problems,
    device_warnings,
    disk_problems,
    left_out_warnings,
    source_problems,
    store_problems,
    studies_folder,
    weights_warnings,
)

router = APIRouter(tags=["Health"])


@router.get("/healthz", summary="Whether the server runs")
async def healthz() -> dict[str, str]:
    """Always ok, as long as there is somebody to say so, also while every thread is busy."""
    return {"status": "ok"}


@router.get("/readyz", summary="Whether the server can work", responses={503: {"description": "it cannot"}})
def readyz(
    loading: WeightsLoadingDep,
    trainers: TrainTasksDep,
    store: StoreDep,
    studies: StudiesDep,
    settings: SettingsDep,
    lanes: LanesDep,
    let_in: IsLetIn,
    response: Response,
) -> dict[str, Any]:
    """Whether weights load, the studies can be read and written to, and disk is left; 503 if not, with what is wrong.

    Weights that are not there yet are loaded in the background, by this request where by none before, and the server
    is not ready until they are. A model that nobody has trained yet is no failure: labelling for it is how it gets
    trained. Nor is a damaged live version, as long as the one before it is served, or a device that fell out beside
    others; ``warnings`` says so.

    Names of files, which may be patients', are shown only to users who may see the studies.
    """
    loaded, problems = loading.states()
    problems += device_problems(lanes)
    problems += disk_problems(studies_folder(studies), settings.free_disk_mib)
    problems += [*store_problems(store), *source_problems(store)]
    response.status_code = 503 if problems else 200
    left_out = left_out_warnings(store, named=let_in)
    state = {"status": "not ready" if problems else "ready", "problems": problems, "models": loaded}
    return state | {"warnings": [*device_warnings(lanes), *weights_warnings(trainers), *left_out]}


@router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
def metrics(metrics: MetricsDep, user: AsUser) -> Response:
    """Requests, queue, inferences, jobs, studies, disk, process."""
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)
