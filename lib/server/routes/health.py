"""``/healthz``, ``/readyz`` and ``/metrics``: for whoever watches over the server."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lib.datastore.repair import shorten
from lib.datastore.series import SeriesDatastore
from lib.errors import CheckpointError, ModelNotReadyError
from lib.server.http.auth import AsUser
from lib.server.http.uploads import MIB
from lib.server.services import Parts, Services

router = APIRouter(tags=["Health"])


@router.get("/healthz", summary="Whether the server runs")
def healthz() -> dict[str, str]:
    """Always ok, as long as there is somebody to say so."""
    return {"status": "ok"}


@router.get("/readyz", summary="Whether the server can work", responses={503: {"description": "it cannot"}})
def readyz(parts: Parts, response: Response) -> dict[str, Any]:
    """Whether weights load, the studies can be read and written to, and disk is left; 503 if not, with what is wrong.

    A model that nobody has trained yet is no failure: labelling for it is how it gets trained. Nor is a damaged live
    version, as long as the one before it is served; ``warnings`` says so.
    """
    models, problems = load_models(parts)
    problems += [*disk_problems(parts), *store_problems(parts), *source_problems(parts)]
    response.status_code = 503 if problems else 200
    state = {"status": "not ready" if problems else "ready", "problems": problems, "models": models}
    return state | {"warnings": [*weights_warnings(parts), *left_out_warnings(parts)]}


@router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
def metrics(parts: Parts, user: AsUser) -> Response:
    """Requests, queue, inferences, jobs, studies, disk, process."""
    return Response(parts.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def load_models(parts: Services) -> tuple[dict[str, str], list[str]]:
    """The version of each model's weights, and a sentence for those that cannot be used. They stay loaded."""
    versions, problems = {}, []
    for name in parts.segmentation_tasks:
        try:
            versions[name] = parts.infer_task(name).load()["version"]
        except ModelNotReadyError:
            versions[name] = "untrained"
        except CheckpointError as error:
            versions[name] = "unusable"
            problems.append(f"model {name!r}: {error}")
    return versions, problems


def weights_warnings(parts: Services) -> list[str]:
    """A sentence for each model that is served by another version than its live one."""
    states = {name: parts.train_task(name).serving() for name in parts.instance.trainers}
    return [f"model {name!r}: {problem}" for name, (serving, problem) in states.items() if serving and problem]


def left_out_warnings(parts: Services) -> list[str]:
    """A sentence for each of the first files of the studies that are not taken in, and how many more there are."""
    return shorten([f"{name!r} is left out: it {why}" for name, why in sorted(parts.store.left_out().items())])


def disk_problems(parts: Services) -> list[str]:
    """What is wrong with the studies folder; nothing where the studies are a server."""
    folder = studies_folder(parts)
    if folder is None:
        return []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        return [f"the studies folder cannot be written to: {error.strerror or error}"]
    free_mib = shutil.disk_usage(folder).free // MIB
    wanted = parts.settings.free_disk_mib
    return [f"{free_mib} MiB of disk are free; valid: at least {wanted} MiB"] if free_mib < wanted else []


def store_problems(parts: Services) -> list[str]:
    """What cannot be served since the studies folder cannot be written to."""
    if not parts.store.history.read_only:
        return []
    return [
        "the studies folder cannot be written to: images are segmented and labels shown as they are; labels and images "
        "that are sent are refused (507), and who works on which case is forgotten at the next start"
    ]


def source_problems(parts: Services) -> list[str]:
    """What is wrong with where the series come from: a PACS that does not answer, an index that stands still."""
    store = parts.datastore
    problem = store.source.problem() if isinstance(store, SeriesDatastore) else ""
    return [problem] if problem else []


def studies_folder(parts: Services) -> Path | None:
    """The studies folder; None where the studies are a server."""
    studies = str(parts.instance.studies)
    return None if studies.startswith(("http://", "https://")) else Path(studies)
