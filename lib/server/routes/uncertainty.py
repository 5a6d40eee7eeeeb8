"""``GET /uncertainty/{model}``: a map of the model's uncertainty. ``GET /review/{model}``: labels to review."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from monailabel.interfaces.datastore import Datastore

from lib.activelearning.pool_knowledge import PoolKnowledge, version_name
from lib.activelearning.score_store import LabelDisagreement
from lib.activelearning.task import label_stamps
from lib.errors import CheckpointError, ModelNotReadyError, NotFoundError
from lib.infers.request import InferRequest
from lib.infers.task import UnetrInferTask
from lib.server.dependencies import DatastoreDep, ImagesDep, InferencesDep, PoolKnowledgeDep, SegmentationTasksDep
from lib.server.http.auth import AsUser
from lib.server.http.names import as_attachment
from lib.server.work.prefetch import PrefetchKey

router = APIRouter(tags=["Active learning"])

NIFTI = "application/gzip"


@router.get("/uncertainty/{model}", summary="How unsure a model is, voxel by voxel", response_class=Response)
async def uncertainty(
    request: Request,
    tasks: SegmentationTasksDep,
    images: ImagesDep,
    inferences: InferencesDep,
    user: AsUser,
    model: str,
    image: str,
) -> Response:
    """A NIfTI file (``.nii.gz``, 32-bit numbers) on the image's own grid: entropy, 0 (certain) to 1."""
    task = tasks.find(model)
    path = await anyio.to_thread.run_sync(lambda: images.file(images.check(image)))
    asked = task.parse({"image": str(path)})
    what = PrefetchKey(model, f"uncertainty of {image}")
    forecast = await anyio.to_thread.run_sync(inferences.forecast, task, asked)
    async with inferences.slot(what=what, forecast=forecast) as slot:
        if await request.is_disconnected():
            return Response(status_code=499)
        content = await slot.run(lambda: compute(task, asked))
    return Response(content, media_type=NIFTI, headers=as_attachment(f"{path.name.split('.')[0]}-uncertainty.nii.gz"))


def compute(task: UnetrInferTask, asked: InferRequest) -> bytes:
    """The content of the file.

    Raises:
        ImageError: if the image cannot be segmented.
        ModelNotReadyError: if there are no usable weights.
    """
    try:
        file = task.map_uncertainty(asked)
    except CheckpointError as error:
        raise ModelNotReadyError(f"the weights of {task.preset.name!r} cannot be used: {error}") from error
    try:
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


@router.get("/review/{model}", summary="Labels that the model doubts, the most suspicious first")
def review(
    knowledge_by_preset: PoolKnowledgeDep,
    datastore: DatastoreDep,
    user: AsUser,
    model: str,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> dict[str, Any]:
    """Labelled cases with the largest disagreement between live version and label, compared in the background."""
    if model not in knowledge_by_preset:
        raise NotFoundError("model", model[:200], list(knowledge_by_preset))
    knowledge = knowledge_by_preset[model]
    version = knowledge.version()
    disagreements = current_disagreements(datastore, knowledge_by_preset, knowledge, version)
    worst = sorted(disagreements, key=lambda disagreement: (-disagreement.suspicion, disagreement.image_id))[:limit]
    return {
        "model": {"preset": model, "version": version_name(version)},
        "compared": len(disagreements),
        "labelled": len(datastore.get_labeled_images()),
        "cases": [describe(disagreement, rank) for rank, disagreement in enumerate(worst, start=1)],
    }


def current_disagreements(
    datastore: Datastore, knowledge_by_preset: Mapping[str, PoolKnowledge], knowledge: PoolKnowledge, version: str
) -> list[LabelDisagreement]:
    """A version's disagreements with labels that have not changed since the comparison."""
    known = knowledge.store.disagreements(version)
    return [
        disagreement
        for image, label in label_stamps(datastore, knowledge.preset, knowledge_by_preset).items()
        if (disagreement := known.get(image)) is not None and disagreement.label == label
    ]


def describe(disagreement: LabelDisagreement, rank: int) -> dict[str, Any]:
    """A disagreement as JSON data."""
    dice = {name: round(value, 3) for name, value in disagreement.dice.items()}
    return {"rank": rank, "image": disagreement.image_id, "suspicion": round(disagreement.suspicion, 3), "dice": dice}
