"""``/healthz``, ``/readyz`` and ``/metrics``: for whoever watches over the server."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from monailabel.interfaces.datastore import Datastore
from prometheus_client import CONTENT_TYPE_LATEST

from lib.datastore.repair import shorten
from lib.datastore.series import SeriesDatastore
from lib.datastore.store import VersionedDatastore
from lib.errors import CheckpointError, ModelNotReadyError
from lib.infers.devices.lanes import Lanes
from lib.infers.task import UnetrInferTask
from lib.server.dependencies import (
    LanesDep,
    MetricsDep,
    SegmentationTasksDep,
    SettingsDep,
    StoreDep,
    StudiesDep,
    TrainTasksDep,
)
from lib.server.http.auth import AsUser
from lib.server.http.uploads import MIB
from lib.server.tasks import TasksByName
from lib.storage.full_disk import storage_problem
from lib.trainers.task import UnetrTrainTask

router = APIRouter(tags=["Health"])


@router.get("/healthz", summary="Whether the server runs")
def healthz() -> dict[str, str]:
    """Always ok, as long as there is somebody to say so."""
    return {"status": "ok"}


@router.get("/readyz", summary="Whether the server can work", responses={503: {"description": "it cannot"}})
def readyz(
    models: SegmentationTasksDep,
    trainers: TrainTasksDep,
    store: StoreDep,
    studies: StudiesDep,
    settings: SettingsDep,
    lanes: LanesDep,
    response: Response,
) -> dict[str, Any]:
    """Whether weights load, the studies can be read and written to, and disk is left; 503 if not, with what is wrong.

    A model that nobody has trained yet is no failure: labelling for it is how it gets trained. Nor is a damaged live
    version, as long as the one before it is served, or a device that fell out beside others; ``warnings`` says so.
    """
    loaded, problems = load_models(models)
    problems += device_problems(lanes)
    problems += disk_problems(studies_folder(studies), settings.free_disk_mib)
    problems += [*store_problems(store), *source_problems(store)]
    response.status_code = 503 if problems else 200
    state = {"status": "not ready" if problems else "ready", "problems": problems, "models": loaded}
    return state | {"warnings": [*device_warnings(lanes), *weights_warnings(trainers), *left_out_warnings(store)]}


@router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
def metrics(metrics: MetricsDep, user: AsUser) -> Response:
    """Requests, queue, inferences, jobs, studies, disk, process."""
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)


def load_models(models: TasksByName[UnetrInferTask]) -> tuple[dict[str, str], list[str]]:
    """The version of each model's weights, and a sentence for those that cannot be used. They stay loaded."""
    versions, problems = {}, []
    for name, task in models.items():
        try:
            versions[name] = task.load()["version"]
        except ModelNotReadyError:
            versions[name] = "untrained"
        except CheckpointError as error:
            versions[name] = "unusable"
            problems.append(f"model {name!r}: {error}")
    return versions, problems


def device_problems(lanes: Lanes) -> list[str]:
    """A sentence for each device that is out, where no other is left."""
    return [] if lanes.any_works else lanes.problems()


def device_warnings(lanes: Lanes) -> list[str]:
    """A sentence for each device that is out beside others that work."""
    return lanes.problems() if lanes.any_works else []


def weights_warnings(trainers: TasksByName[UnetrTrainTask]) -> list[str]:
    """A sentence for each model that is served by another version than its live one."""
    states = {name: task.serving() for name, task in trainers.items()}
    return [f"model {name!r}: {problem}" for name, (serving, problem) in states.items() if serving and problem]


def left_out_warnings(store: VersionedDatastore) -> list[str]:
    """A sentence for each of the first files of the studies that are not taken in, and how many more there are."""
    return shorten([f"{name!r} is left out: it {why}" for name, why in sorted(store.left_out().items())])


def disk_problems(folder: Path | None, wanted_mib: int) -> list[str]:
    """What is wrong with the studies folder, on whose disk so much is to be free; nothing where there is no folder."""
    if folder is None:
        return []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        problem = storage_problem(error) or error.strerror or error
        return [f"the studies folder cannot be written to: {problem}"]
    free_mib = shutil.disk_usage(folder).free // MIB
    return [f"{free_mib} MiB of disk are free; valid: at least {wanted_mib} MiB"] if free_mib < wanted_mib else []


def store_problems(store: VersionedDatastore) -> list[str]:
    """What cannot be served since the studies folder cannot be written to."""
    if not store.history.read_only:
        return []
    return [
        "the studies folder cannot be written to: images are segmented and labels shown as they are; labels and images "
        "that are sent are refused (507), and who works on which case is forgotten at the next start"
    ]


def source_problems(store: Datastore) -> list[str]:
    """What is wrong with where the series come from: a PACS that does not answer, an index that stands still."""
    problem = store.source.problem() if isinstance(store, SeriesDatastore) else ""
    return [problem] if problem else []


def studies_folder(studies: str) -> Path | None:
    """The studies folder; None where the studies are a server."""
    return None if studies.startswith(("http://", "https://")) else Path(studies)
