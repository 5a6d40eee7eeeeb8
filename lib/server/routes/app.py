"""What the app says of itself, the next case to label, and calls that are not taken."""

from __future__ import annotations

import logging
import time
from collections.abc import Set
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Depends, Request
from monailabel.interfaces.exception import ImageNotFoundException
from starlette.exceptions import HTTPException

from lib.datastore.leases import Lease
from lib.datastore.open_cases import OpenCases
from lib.errors import NotFoundError
from lib.interaction.dialects import BACKGROUND
from lib.server.http.auth import AsAdmin, AsUser
from lib.server.http.bodies import NextSampleRequest
from lib.server.http.errors import ForbiddenError
from lib.server.http.parameters import check_fields, json_body, json_body_of
from lib.server.labels.segmentations import series_store
from lib.server.services import Parts, Services
from lib.server.work.modality import modality_of, models_for
from lib.server.work.prefetch import PrefetchKey
from lib.trainers.reporting.progress import PROGRESS_FILE
from lib.trainers.reporting.runs import read_json

logger = logging.getLogger("unetr.server")
MOST_UNFIT_IN_A_ROW = 20
"""Images that one request reads and finds unfit for a preset, before the next preset's cases are offered."""

router = APIRouter(tags=["App"])

NOT_TRAINED = {"epoch": 0, "total_epochs": 1, "total_time": "0:00:00"}
"""Clients show a model without figures as in its last epoch (100 %), and one that has a total time as not running."""
NEXT_BODY = json_body_of(NextSampleRequest)


@router.get("/info/", summary="Models, trainers, labels, strategies")
def info(request: Request, parts: Parts, user: AsUser) -> dict[str, Any]:
    """The app's description, which clients request first: models, trainers, strategies, labels, statistics."""
    said: dict[str, Any] = parts.instance.info()
    running = running_training(parts)  # first: clients show the first one
    ended = {model: stats or NOT_TRAINED for model, stats in said["train_stats"].items() if model not in running}
    said["train_stats"] = {**running, **ended}
    hidden = not_offered_in_viewer(request, parts)
    said["models"] = {
        name: model for name, model in said["models"].items() if parts.infer_task(name).preset.name not in hidden
    }
    # Both viewers number labels by this list: the one that only clicks have must not stand between two presets'.
    said["labels"] = sorted(said["labels"], key=lambda name: name == BACKGROUND)
    return said


def not_offered_in_viewer(request: Request, parts: Services) -> Set[str]:
    """The models that OHIF does not offer for the study that it shows; none for other clients."""
    page = urlsplit(request.headers.get("referer", ""))
    studies = set(",".join(parse_qs(page.query).get("StudyInstanceUIDs", [])).split(","))
    if not is_viewer(request):
        return frozenset()
    shown = [info.attributes["Modality"] for info in series_store(parts).series().values() if info.study in studies]
    files = [case for uid in studies if (case := parts.presented.case_of(uid)) is not None]
    shown += [parts.presented.attributes(case)["Modality"] for case in files]
    return parts.presets.keys() - models_for(parts.presets, shown) if shown else frozenset()


def running_training(parts: Services) -> dict[str, dict[str, float]]:
    """Epochs of the training that runs or waits, by its model, as OHIF's panel and 3D Slicer show them.

    Slicer divides by ``total_epochs``, also before the training has said anything: then the request tells.
    """
    job = parts.jobs.current("train")
    if job is None:
        return {}
    model = str(job.request["model"])
    task = parts.train_task(model)
    progress = read_json(task.runs / job.id / PROGRESS_FILE)
    total = int(progress.get("max_epochs") or task.validate_request(job.request).max_epochs)
    best = progress.get("best_mean_dice")
    said: dict[str, float] = {"epoch": int(progress.get("epoch", 0)), "total_epochs": total}
    return {model: said | ({} if best is None else {"best_metric": float(best)})}


@router.post("/activelearning/", summary="The next case to label, by the default strategy", openapi_extra=NEXT_BODY)
def next_sample_by_default(
    request: Request, parts: Parts, user: AsUser, params: Annotated[dict[str, Any], Depends(json_body)]
) -> dict[str, Any]:
    """As with a strategy's name, for clients that name none: ``--conf strategy`` says which."""
    return next_sample(request, parts, user, parts.settings.strategy, params)


@router.post("/activelearning/{strategy}", summary="The next case to label", openapi_extra=NEXT_BODY)
def next_sample(
    request: Request, parts: Parts, user: AsUser, strategy: str, params: Annotated[dict[str, Any], Depends(json_body)]
) -> dict[str, Any]:
    """The chosen image and what is known of it; an empty object when everything is labelled."""
    check_fields(NextSampleRequest, params)
    known = list(parts.instance.strategies)
    if strategy not in known:
        raise NotFoundError("strategy", strategy[:200], known)
    if not parts.datastore.list_images():
        raise HTTPException(404, "there is no image in the studies yet")
    client = user.client(params.get("client_id"))
    parts.store.leases.renew(client)
    asked = {"user": user.name, **params, "strategy": strategy}
    chosen, lease = choose_case(parts, asked, client, not_shown_by(request, parts))
    if chosen is None or lease is None:
        return {}
    image = chosen["id"]
    parts.store.effort.hand_out(image, client)
    prepare(parts, chosen)
    known_info: dict[str, Any] = parts.datastore.get_image_info(image)
    handed_out = dict(known_info.get("strategy", {}))
    handed_out[strategy] = {"ts": time.time(), "client_id": params.get("client_id", user.name)}
    parts.datastore.update_image_info(image, {"strategy": handed_out})
    return chosen | known_info | parts.presented.attributes(image) | {"strategy": handed_out, "lease": lease.describe()}


def not_shown_by(request: Request, parts: Services) -> Set[str]:
    """Images that a client cannot show: OHIF, which names itself as the page that asks, shows DICOM only."""
    if not is_viewer(request):
        return frozenset()
    store = series_store(parts)
    shown = {image for image in store.list_images() if parts.presented.attributes(image)}
    return set(store.list_images()) - store.series().keys() - shown


def is_viewer(request: Request) -> bool:
    """Whether OHIF asks, which names itself as the page that asks."""
    base = str(request.scope.get("root_path", "")).rstrip("/")
    return urlsplit(request.headers.get("referer", "")).path.startswith(f"{base}/ohif/")


def choose_case(
    parts: Services, request: dict[str, Any], client: str, hidden: Set[str]
) -> tuple[dict[str, Any] | None, Lease | None]:
    """Have a strategy choose among the cases that nobody works on and nobody skipped, and lease its choice.

    A client that names no model is given a case of the first preset that has any left.

    Returns:
        The choice and its lease; one that the client has already when no other is left, None without any.
    """
    models = [str(request["model"])] if request.get("model") else list(parts.presets)
    for model in models:
        chosen = choose_for_model(parts, request | {"model": model}, client, hidden, several=len(models) > 1)
        if chosen is not None:
            return chosen
    unfit = frozenset.intersection(*(frozenset(parts.image_inspector.left_out(model)) for model in models))
    return own_case(parts, client, hidden | unfit)


def choose_for_model(
    parts: Services, request: dict[str, Any], client: str, hidden: Set[str], several: bool
) -> tuple[dict[str, Any], Lease] | None:
    """Have a strategy choose a case for one model, and lease it.

    One that turns out to be damaged or unfit for the model is left out with the reason, and another one chosen. Where
    several models share the pool, only so many images are read before the next model is asked.

    Returns:
        The choice and its lease; None when no case is left for this model.
    """
    strategy, leases, model = parts.instance.strategies[request["strategy"]], parts.store.leases, request["model"]
    taken: set[str] = set()
    unfit = 0
    while not several or unfit < MOST_UNFIT_IN_A_ROW:
        broken = parts.image_inspector.left_out(model).keys()
        closed = leases.active().keys() | leases.skipped().keys() | broken | taken | hidden
        chosen: dict[str, Any] | None = strategy(request, OpenCases(parts.datastore, closed))
        if not chosen or not chosen.get("id"):
            return None
        lease = leases.take(chosen["id"], client)
        if lease is not None:
            try:
                check = parts.image_inspector.check(chosen["id"], parts.presets[chosen["model"]])
                if not check.problem:
                    return chosen | {"path": parts.datastore.get_image_uri(chosen["id"])}, lease
                leases.release(chosen["id"])
                unfit += 1
            except (NotFoundError, ImageNotFoundException):  # one that has just been deleted
                leases.release(chosen["id"])
            except Exception:  # nobody was given the case
                leases.release(chosen["id"])
                raise
        taken.add(chosen["id"])  # by somebody who asked at the same time
    return None


def own_case(parts: Services, client: str, hidden: Set[str]) -> tuple[dict[str, Any] | None, Lease | None]:
    """The case that a client has had longest and not labelled yet."""
    unlabelled = set(parts.datastore.get_unlabeled_images()) - hidden
    own = [lease for lease in parts.store.leases.active().values() if lease.client == client]
    held = sorted((lease for lease in own if lease.image_id in unlabelled), key=lambda lease: lease.since)
    if not held:
        return None, None
    path = parts.datastore.get_image_uri(held[0].image_id)
    reason = "yours already; no other case is open"
    return {"id": held[0].image_id, "path": path, "reason": reason, "next": [], "next_reasons": []}, held[0]


def prepare(parts: Services, chosen: dict[str, Any]) -> None:
    """Have the masks of the case that is handed out, and of those that will probably be next, computed ahead."""
    offered = models_for(parts.presets, [modality_of(parts.datastore, chosen["id"])])
    model = chosen.get("model") or next(iter(offered), "")
    if model not in offered:
        return
    if parts.segmentation_task(model).is_valid():
        parts.prefetcher.want([PrefetchKey(model, image) for image in (chosen["id"], *chosen["next"])])


@router.post("/reload", include_in_schema=False)
def reload(user: AsAdmin) -> None:
    """Refuse MONAI Label's reload, which builds a second app beside this one and then deadlocks.

    Raises:
        ForbiddenError: always.
    """
    raise ForbiddenError("this server is not reloaded while it runs; stop it and start it again")
