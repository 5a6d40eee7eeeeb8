"""What the app says of itself, the next case to label, and calls that are not taken."""

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
"""Clients show a model without figures as in its last epoch (100 %), and one that has a total time as not running."""
NEXT_BODY = json_body_of(NextSampleRequest)


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
    running = running_training(jobs, trainers)  # first: clients show the first one
    ended = {model: stats or NOT_TRAINED for model, stats in payload["train_stats"].items() if model not in running}
    payload["train_stats"] = {**running, **ended}
    hidden = not_offered_in_viewer(request, store, presets, presented)
    payload["models"] = {
        name: model for name, model in payload["models"].items() if tasks.find(name).preset.name not in hidden
    }
    # Both viewers number labels by this list: the one that only clicks have must not stand between two presets'.
    payload["labels"] = sorted(payload["labels"], key=lambda name: name == BACKGROUND)
    return payload


def not_offered_in_viewer(
    request: Request, store: SeriesDatastore, presets: Mapping[str, Preset], presented: PresentedCases
) -> Set[str]:
    """The models that OHIF does not offer for the study that it shows; none for other clients."""
    page = split_address(request.headers.get("referer", ""))
    if page is None or not is_viewer(request):
        return frozenset()
    studies = set(",".join(parse_qs(page.query).get("StudyInstanceUIDs", [])).split(","))
    shown = [info.attributes["Modality"] for info in store.series().values() if info.study in studies]
    files = [case for uid in studies if (case := presented.case_of(uid)) is not None]
    shown += [presented.attributes(case)["Modality"] for case in files]
    return presets.keys() - models_for(presets, shown) if shown else frozenset()


def running_training(jobs: Jobs, trainers: TasksByName[UnetrTrainTask]) -> dict[str, dict[str, float]]:
    """Epochs of the training that runs or waits, by its model, as OHIF's panel and 3D Slicer show them.

    3D Slicer divides by ``total_epochs``, also before any progress is reported: then the request's number is sent.
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
    """As with a strategy's name, for clients that name none: ``--conf strategy`` says which."""
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
    """The chosen image and what is known of it; an empty object when everything is labelled."""
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
    while True:
        chosen, lease = cases.choose(asked, client, hidden)
        if chosen is None or lease is None:
            return {}
        try:
            handed_out = note_handed_out(store, chosen["id"], strategy, params.get("client_id", user.name), client)
        except ImageNotFoundException:  # it was deleted since it was chosen
            store.leases.release(chosen["id"])
            continue
        cases.compute_ahead(chosen)
        return chosen | handed_out | presented.attributes(chosen["id"]) | {"lease": lease.describe()}


def note_handed_out(store: SeriesDatastore, image: str, strategy: str, named: str | int, client: str) -> dict[str, Any]:
    """Remember who was handed a case and by which strategy; returns what is known of it.

    Args:
        store: the studies.
        image: the case's id.
        strategy: which chose it.
        named: the client as it names itself.
        client: the client by whom its effort is counted.

    Raises:
        ImageNotFoundException: when there is no such case any more.
    """
    known: dict[str, Any] = store.get_image_info(image)
    handed_out = {**known.get("strategy", {}), strategy: {"ts": time.time(), "client_id": named}}
    store.update_image_info(image, {"strategy": handed_out})
    store.effort.hand_out(image, client)
    return known | {"strategy": handed_out}


def not_shown_by(request: Request, store: SeriesDatastore, presented: PresentedCases) -> Set[str]:
    """Images that a client cannot show: OHIF, which names itself as the page that asks, shows DICOM only."""
    if not is_viewer(request):
        return frozenset()
    shown = {image for image in store.list_images() if presented.attributes(image)}
    return set(store.list_images()) - store.series().keys() - shown


def is_viewer(request: Request) -> bool:
    """Whether OHIF asks, which names itself as the page that asks."""
    base = str(request.scope.get("root_path", "")).rstrip("/")
    page = split_address(request.headers.get("referer", ""))
    return page is not None and page.path.startswith(f"{base}/ohif/")


@router.post("/reload", include_in_schema=False)
def reload(user: AsAdmin) -> None:
    """Refuse MONAI Label's reload, which builds a second app beside this one and then deadlocks.

    Raises:
        ForbiddenError: always.
    """
    raise ForbiddenError("this server is not reloaded while it runs; stop it and start it again")
