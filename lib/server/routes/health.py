"""``/healthz``, ``/readyz`` and ``/metrics``: routes for monitoring."""

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
    """Always ok while the server responds, even if every thread is busy."""
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
    """Whether weights load, the studies are readable and writable, and disk space is left; otherwise 503 with reasons.

    Weights that are not loaded yet are loaded in the background, if necessary by this request, and the server is not
    ready until they are loaded. An untrained model is not a failure, since it is trained by labelling. A damaged live
    version is not a failure as long as its predecessor is in use, nor is a failed device next to working ones;
    ``warnings`` lists them.

    File names, which may contain patients' names, are shown only to users with access to the studies.
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
    """Metrics of requests, queue, inferences, jobs, studies, disk and process."""
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)
