"""The description of the app, the next case to label, and calls that are not supported."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Set
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Request
from monailabel.interfaces.exception import ImageNotFoundException
from starlette.exceptions import HTTPException

from lib.configs.preset import Preset
from lib.datastore.series import SeriesDatastore
from lib.errors import NotFoundError
from lib.interaction.dialects import BACKGROUND
from lib.server.dependencies import (
    AppInfoDep,
    InferTasksDep,
    JobsDep,
    NextCaseDep,
    PresentedDep,
    PresetsDep,
    SettingsDep,
    StoreDep,
    TrainTasksDep,
)
from lib.server.http.auth import AsAdmin, AsUser
from lib.server.http.bodies import NextSampleRequest
from lib.server.http.errors import ForbiddenError
from lib.server.http.origins import split_address
from lib.server.http.parameters import check_fields, json_body, json_body_of
from lib.server.presented.cases import PresentedCases
from lib.server.tasks import TasksByName
from lib.server.work.jobs import Jobs
from lib.server.work.modality import models_for
from lib.trainers.reporting.progress import read_progress
from lib.trainers.task import UnetrTrainTask

logger = logging.getLogger("unetr.server")
router = APIRouter(tags=["App"])

NOT_TRAINED = {"epoch": 0, "total_epochs": 1, "total_time": "0:00:00"}
"""Statistics of a model without any, for which clients would show 100 %, or a finished training."""
NEXT_BODY = json_body_of(NextSampleRequest)
MOST_DELETED_MEANWHILE = 20
"""Images that are deleted during one request for the next case; after so many it fails."""


@router.get("/info/", summary="Models, trainers, labels, strategies")
def info(
    request: Request,
    description: AppInfoDep,
    jobs: JobsDep,
    trainers: TrainTasksDep,
    tasks: InferTasksDep,
    store: StoreDep,
    presets: PresetsDep,
    presented: PresentedDep,
    user: AsUser,
) -> dict[str, Any]:
    """The app's description, which clients request first: models, trainers, strategies, labels, statistics."""
    payload = description()
    running = running_training(jobs, trainers)  # comes first, since clients show the first one
    ended = {model: stats or NOT_TRAINED for model, stats in payload["train_stats"].items() if model not in running}
    payload["train_stats"] = {**running, **ended}
    hidden = not_offered_in_viewer(request, store, presets, presented)
    payload["models"] = {
        name: model for name, model in payload["models"].items() if tasks.find(name).preset.name not in hidden
    }
    # Both viewers number labels by this list: the label that only clicks have must not come between those of two
    # presets.
    payload["labels"] = sorted(payload["labels"], key=lambda name: name == BACKGROUND)
    return payload


def not_offered_in_viewer(
    request: Request, store: SeriesDatastore, presets: Mapping[str, Preset], presented: PresentedCases
) -> Set[str]:
    """The models that OHIF does not offer for the displayed study; none for other clients."""
    page = split_address(request.headers.get("referer", ""))
    if page is None or not is_viewer(request):
        return frozenset()
    studies = set(",".join(parse_qs(page.query).get("StudyInstanceUIDs", [])).split(","))
    shown = [info.attributes["Modality"] for info in store.series().values() if info.study in studies]
    files = [case for uid in studies if (case := presented.case_of(uid)) is not None]
    shown += [presented.attributes(case)["Modality"] for case in files]
    return presets.keys() - models_for(presets, shown) if shown else frozenset()


def running_training(jobs: Jobs, trainers: TasksByName[UnetrTrainTask]) -> dict[str, dict[str, float]]:
    """Epochs of the running or waiting training, by its model, as OHIF's panel and 3D Slicer show them.

    3D Slicer divides by ``total_epochs``, even before any progress is reported, so the request's number is sent then.
    """
    job = jobs.current("train")
    if job is None:
        return {}
    model = str(job.request["model"])
    task = trainers.find(model)
    progress = read_progress(task.runs / job.id)
    total = int(progress.get("max_epochs") or task.validate_request(job.request).max_epochs)
    best = progress.get("best_mean_dice")
    stats: dict[str, float] = {"epoch": int(progress.get("epoch", 0)), "total_epochs": total}
    return {model: stats | ({} if best is None else {"best_metric": float(best)})}


@router.post("/activelearning/", summary="The next case to label, by the default strategy", openapi_extra=NEXT_BODY)
def next_sample_by_default(
    request: Request,
    settings: SettingsDep,
    cases: NextCaseDep,
    store: StoreDep,
    presented: PresentedDep,
    user: AsUser,
    params: Annotated[dict[str, Any], Depends(json_body)],
) -> dict[str, Any]:
    """Like the route with a strategy's name, with the strategy of ``--conf strategy``."""
    return next_sample(request, cases, store, presented, user, settings.strategy, params)


@router.post("/activelearning/{strategy}", summary="The next case to label", openapi_extra=NEXT_BODY)
def next_sample(
    request: Request,
    cases: NextCaseDep,
    store: StoreDep,
    presented: PresentedDep,
    user: AsUser,
    strategy: str,
    params: Annotated[dict[str, Any], Depends(json_body)],
) -> dict[str, Any]:
    """The chosen image and information on it; an empty object if everything is labelled."""
    check_fields(NextSampleRequest, params)
    known = list(cases.strategies)
    if strategy not in known:
        raise NotFoundError("strategy", strategy[:200], known)
    if not store.list_images():
        raise HTTPException(404, "there is no image in the studies yet")
    client = user.client(params.get("client_id"))
    store.leases.renew(client)
    asked = {"user": user.name, **params, "strategy": strategy}
    hidden = not_shown_by(request, store, presented)
    deleted = 0
    while True:
        chosen = None
        try:
            chosen, lease = cases.choose(asked, client, hidden)
            if chosen is None or lease is None:
                return {}
            handed_out = note_handed_out(store, chosen["id"], strategy, params.get("client_id", user.name), client)
            cases.compute_ahead(chosen)
            return chosen | handed_out | presented.attributes(chosen["id"]) | {"lease": lease.describe()}
        except ImageNotFoundException:  # an image was deleted while the strategy looked at it, or since it was chosen
            if chosen is not None:
                store.leases.release(chosen["id"])
            deleted += 1
            if deleted == MOST_DELETED_MEANWHILE:
                raise


def note_handed_out(store: SeriesDatastore, image: str, strategy: str, named: str | int, client: str) -> dict[str, Any]:
    """Record the hand-out of a case and its strategy; returns information on the image.

    Args:
        store: the studies.
        image: id of the case.
        strategy: the strategy that chose it.
        named: the client's own name.
        client: the client to which the effort is attributed.

    Raises:
        ImageNotFoundException: if the case no longer exists.
    """
    known: dict[str, Any] = store.get_image_info(image)
    handed_out = {**known.get("strategy", {}), strategy: {"ts": time.time(), "client_id": named}}
    store.update_image_info(image, {"strategy": handed_out})
    store.effort.hand_out(image, client)
    return known | {"strategy": handed_out}


def not_shown_by(request: Request, store: SeriesDatastore, presented: PresentedCases) -> Set[str]:
    """Images that a client cannot show: OHIF shows DICOM only."""
    if not is_viewer(request):
        return frozenset()
    shown = {image for image in store.list_images() if presented.attributes(image)}
    return set(store.list_images()) - store.series().keys() - shown


def is_viewer(request: Request) -> bool:
    """Whether OHIF sends the request, which its referring page shows."""
    base = str(request.scope.get("root_path", "")).rstrip("/")
    page = split_address(request.headers.get("referer", ""))
    return page is not None and page.path.startswith(f"{base}/ohif/")


@router.post("/reload", include_in_schema=False)
def reload(user: AsAdmin) -> None:
    """Refuse MONAI Label's reload, which creates a second app in the same process and then deadlocks.

    Raises:
        ForbiddenError: always.
    """
    raise ForbiddenError("this server is not reloaded while it runs; stop it and start it again")
