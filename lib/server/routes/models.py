"""``/model/``: download and upload of weights, and the versions of each model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import APIRouter, File, UploadFile
from fastapi.responses import FileResponse
from monailabel.interfaces.datastore import Datastore

from lib.configs.preset import Preset
from lib.errors import CheckpointError, InputError, NotFoundError, TrainingError, UnetrError
from lib.infers.segmenter import Segmenter
from lib.infers.task import UnetrInferTask
from lib.models.provenance import code_version
from lib.models.versions import Version, VersionStore
from lib.models.weights import preset_for, read_live
from lib.networks.checkpoint import check_finite, fitting, read_checkpoint
from lib.networks.unetr import build_unetr
from lib.server.dependencies import (
    DatastoreDep,
    ImageFileDep,
    ModelInfoDep,
    ReadersDep,
    SegmentationTasksDep,
    TrainTasksDep,
    VersionedModelsDep,
)
from lib.server.downloads import send_file, show_file
from lib.server.http.auth import AsAdmin, AsReviewer, AsUser
from lib.server.http.errors import ForbiddenError
from lib.server.http.uploads import FormRoute, receive, temporary_folder
from lib.server.tasks import TasksByName
from lib.trainers.task import UnetrTrainTask
from lib.transforms.inputs import read_input
from lib.transforms.volume import Volume

logger = logging.getLogger("unetr.server")

CASES_TRIED = 3
MOST_IMAGES_OPENED = 20
router = APIRouter(prefix="/model", tags=["Model"], route_class=FormRoute)


@router.get("/{model}", summary="Download the weights in use", response_class=FileResponse)
def download(models: SegmentationTasksDep, user: AsAdmin, model: str) -> FileResponse:
    """The live weights."""
    path = current_weights(models, model)
    return send_file(path, "application/octet-stream", f"{model}{path.suffix}")


@router.get("/info/{model}", summary="Checksum and figures of the weights in use")
def describe(models: SegmentationTasksDep, model_info: ModelInfoDep, user: AsAdmin, model: str) -> dict[str, Any]:
    """SHA-256, time of the last change, and figures of the last training."""
    current_weights(models, model)
    return model_info(model)


@router.get("/versions/{model}", summary="All versions, and which one is live")
def versions(trained: VersionedModelsDep, user: AsUser, model: str) -> dict[str, Any]:
    """Name, status, time, parent, reason and scores of each version, oldest first.

    ``live`` is the version that was published or chosen last; ``serving`` is the version in use, which differs if the
    live one is damaged, as ``problem`` states.
    """
    task = trained.find(model)
    serving, problem = task.serving()
    listed = [summarize(version) for version in task.versions.list()]
    return {"live": live_name(task.versions), "serving": serving or None, "problem": problem, "versions": listed}


@router.get("/versions/{model}/{version}", summary="All that is known of a version")
def version_details(trained: VersionedModelsDep, user: AsUser, model: str, version: str) -> dict[str, Any]:
    """Preset, recipe, split, training labels, scores, comparison, parent, SHA-256."""
    stored = trained.find(model).versions.get(version)
    damaged = {"reason": stored.damage} if stored.damage else {}
    return {"version": stored.name} | dict(stored.details) | {"status": stored.status} | damaged


@router.get("/versions/{model}/{version}/report", summary="A version's report", response_class=FileResponse)
def version_report(trained: VersionedModelsDep, user: AsUser, model: str, version: str) -> FileResponse:
    """One HTML page: curves, scores, comparison, worst cases, data; for versions that a training made."""
    file = trained.find(model).versions.get(version).report
    if file is None:
        raise NotFoundError("report of version", version[:200])
    return show_file(file, "text/html")


@router.post("/rollback/{model}", summary="Serve another version again")
def rollback(
    trained: VersionedModelsDep, user: AsAdmin, model: str, version: str = "", rejected: bool = False
) -> dict[str, Any]:
    """Make the named version live, or by default the predecessor of the live one.

    The next inference uses it; no version is removed. With ``rejected``, a version that the gate rejected is allowed
    too, on the user's responsibility.
    """
    store = trained.find(model).versions
    live = store.rollback(version, rejected, user.name).name if version else store.withdraw()
    against = " against the gate" if version and store.get(version).status == "rejected" else ""
    logger.info("%s rolled back to %s by %s%s", model, live or "what it starts with", user.name, against)
    return {"live": live or None}


@router.post("/versions/{model}/{version}/serve", summary="Serve a version that nothing has judged")
def serve_unproven(trained: VersionedModelsDep, user: AsReviewer, model: str, version: str) -> dict[str, Any]:
    """Make an ``unproven`` version live, on a reviewer's responsibility instead of the gate's.

    Raises:
        TrainingError: for a version of another status, which requires an administrator.
    """
    store = trained.find(model).versions
    status = store.get(version).status
    if status != "unproven":
        raise TrainingError(
            f"version {version[:200]!r} is {status}, not unproven; an administrator serves it with "
            f"POST /model/rollback/{model}?version={version[:200]}"
        )
    live = store.rollback(version, by=user.name).name
    logger.info("%s serves the unproven %s because %s says so", model, live, user.name)
    return {"live": live}


@router.put("/{model}", summary="Upload weights and publish them")
async def upload(
    models: SegmentationTasksDep,
    trainers: TrainTasksDep,
    datastore: DatastoreDep,
    image_file: ImageFileDep,
    readers: ReadersDep,
    user: AsAdmin,
    model: str,
    file: Annotated[UploadFile, File()],
) -> dict[str, Any]:
    """Publish uploaded weights if they match the model; the shipped weights are kept."""
    task, trainer = models.find(model), trainers.find(model)
    return await readers.read(
        lambda: publish_upload(task, trainer, cases_to_try(datastore, image_file, task.preset), file, user.name)
    )


@router.delete("/{model}", summary="Take the published weights out of use")
def withdraw(models: SegmentationTasksDep, trainers: TrainTasksDep, user: AsAdmin, model: str) -> dict[str, Any]:
    """Make the predecessor of the live version live again; the withdrawn version is kept.

    Raises:
        ForbiddenError: if the shipped weights are in use.
    """
    current_weights(models, model)
    try:
        trainers.find(model).versions.withdraw()
    except TrainingError as error:
        raise ForbiddenError(f"model {model!r}: {error}") from error
    logger.info("published weights of %s withdrawn by %s", model, user.name)
    return {}


def live_name(store: VersionStore) -> str | None:
    """The live version; None if there is none, or if the pointer is damaged."""
    try:
        return read_live(store.folder)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None


def summarize(version: Version) -> dict[str, Any]:
    """A row of the list of versions."""
    kept = ("created", "reason", "uploaded_by", "sha256")
    details = {name: version.details[name] for name in kept if name in version.details}
    dice = (version.details.get("held_out") or {}).get("mean_dice")
    summary = {"version": version.name, "status": version.status, "parent": version.parent, "mean_dice": dice}
    damaged = {"reason": version.damage} if version.damage else {}
    return summary | {"never_compared": not version.compared} | details | damaged


def current_weights(models: TasksByName[UnetrInferTask], model: str) -> Path:
    """The live weights file.

    Raises:
        NotFoundError: if there is no such model, or if it has no weights.
    """
    path = models.find(model).get_path()
    if path is None:
        raise NotFoundError("weights of", model)
    return Path(path)


def publish_upload(
    task: UnetrInferTask,
    trainer: UnetrTrainTask,
    cases: Iterable[tuple[str, Volume]],
    upload: UploadFile,
    user: str,
) -> dict[str, Any]:
    """Publish an uploaded checkpoint that matches the model's network and segments something in one of the cases.

    Raises:
        CheckpointError: if it cannot be read, contains code, does not match, is not finite, or segments nothing.
    """
    with temporary_folder() as folder:
        checkpoint = read_checkpoint(receive(upload, folder, "weights.pt"))
        check_finite(checkpoint.model)
        preset = preset_for(checkpoint, task.preset)
        with torch.device("meta"):  # a network of the size in the file's preset may exceed the memory
            network = build_unetr(preset)
        fitting(checkpoint.model, network)
        fitted = Segmenter.from_checkpoint(checkpoint, preset, torch.device("cpu"), "fp32")
        tried = try_on_a_case(fitted, cases)
    details = {
        "parent": trainer.serving()[0],
        "reason": f"uploaded by {user}, without a comparison",
        "compared": False,
        "tried_on": tried,
        "uploaded_by": user,
        "upload_info": dict(checkpoint.info),
        "code": code_version(),
    }
    version = trainer.versions.publish(fitted.network.state_dict(), preset, details)
    logger.info("weights of %s uploaded by %s: %s", task.preset.name, user, version.name)
    return {
        "checksum": f"SHA256:{version.details['sha256']}",
        "modified_time": int(version.weights.stat().st_mtime),
        "version": version.name,
    }


def cases_to_try(
    datastore: Datastore, image_file: Callable[[str], Path], preset: Preset
) -> Iterator[tuple[str, Volume]]:
    """A few readable images of the studies, labelled ones first, since they contain a structure."""
    labelled, all_images = datastore.get_labeled_images(), datastore.list_images()
    tried = 0
    for image in [*labelled, *(name for name in all_images if name not in set(labelled))][:MOST_IMAGES_OPENED]:
        try:
            volume = read_input(image_file(image), preset)
        except UnetrError as error:
            logger.info("uploaded weights are not tried on %s: %s", image, error)
            continue
        yield image, volume
        tried += 1
        if tried == CASES_TRIED:
            return


def try_on_a_case(segmenter: Segmenter, cases: Iterable[tuple[str, Volume]]) -> str:
    """Segment cases until one has a mask with more than one value.

    Returns:
        The id of that case; empty if there is no case to segment.

    Raises:
        CheckpointError: if probabilities are not finite, all masks are uniform, or no case can be segmented.
    """
    without = dict[str, str]()
    for image, volume in cases:
        try:
            segmented = segmenter.segment(volume, name=image, entropy=True)
        except InputError as error:
            logger.info("uploaded weights cannot segment %s: %s", image, error)
            without[image] = f"it cannot be segmented with them ({error})"
            continue
        if segmented.entropy is not None and not np.isfinite(segmented.entropy).all():
            raise CheckpointError(f"the weights were tried on {image!r}, and their probabilities are not finite")
        first = segmented.labels.flat[0]
        if (segmented.labels != first).any():
            return image
        without[image] = f"each of its voxels is {first}" if first else "they segment nothing there"
    if without:
        raise CheckpointError("the weights were tried: " + "; ".join(f"{i!r}: {why}" for i, why in without.items()))
    return ""
