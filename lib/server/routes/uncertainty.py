"""``GET /uncertainty/{model}``: where the model does not know. ``GET /review/{model}``: which labels it doubts."""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from lib.activelearning.insight import Insight, version_name
from lib.activelearning.score_store import Doubt
from lib.activelearning.task import label_stamps
from lib.errors import CheckpointError, ModelNotReadyError, NotFoundError
from lib.server.http.auth import AsUser
from lib.server.http.names import check_image_known
from lib.server.routes.infer import device_of
from lib.server.services import Parts, Services
from lib.server.work.prefetch import Wanted

router = APIRouter(tags=["Active learning"])

NIFTI = "application/gzip"


@router.get("/uncertainty/{model}", summary="How unsure a model is, voxel by voxel", response_class=Response)
async def uncertainty(request: Request, parts: Parts, user: AsUser, model: str, image: str) -> Response:
    """A NIfTI file (``.nii.gz``, 32-bit numbers) on the image's own grid: entropy, 0 (certain) to 1."""
    task = parts.infer_task(model)
    path = await anyio.to_thread.run_sync(lambda: parts.image_file(check_image_known(parts.datastore, image)))
    asked = {"image": str(path), "device": parts.settings.device}
    task.validate_request(asked)
    async with parts.inferences.turn(str(device_of(parts, asked)), Wanted(model, f"uncertainty of {image}")) as turn:
        if await request.is_disconnected():
            return Response(status_code=499)
        content = await turn.run(lambda: compute(parts, model, asked))
    attachment = {"Content-Disposition": f'attachment; filename="{path.name.split(".")[0]}-uncertainty.nii.gz"'}
    return Response(content, media_type=NIFTI, headers=attachment)


def compute(parts: Services, model: str, asked: dict[str, Any]) -> bytes:
    """The file's bytes.

    Raises:
        ImageError: when the image cannot be segmented.
        ModelNotReadyError: when there are no weights, or none that can be used.
    """
    try:
        file = parts.infer_task(model).map_uncertainty(asked)
    except CheckpointError as error:
        raise ModelNotReadyError(f"the weights of {model!r} cannot be used: {error}") from error
    try:
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


@router.get("/review/{model}", summary="Labels that the model doubts, the most suspicious first")
def review(parts: Parts, user: AsUser, model: str, limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> dict[str, Any]:
    """Labelled cases where the served version disagrees most with the label, compared in the background."""
    insights: dict[str, Insight] = parts.instance.insights
    if model not in insights:
        raise NotFoundError("model", model[:200], list(insights))
    insight = insights[model]
    version = insight.version()
    doubts = current_doubts(parts, insight, version)
    worst = sorted(doubts, key=lambda doubt: (-doubt.suspicion, doubt.image_id))[:limit]
    return {
        "model": {"preset": model, "version": version_name(version)},
        "compared": len(doubts),
        "labelled": len(parts.datastore.get_labeled_images()),
        "cases": [describe(doubt, rank) for rank, doubt in enumerate(worst, start=1)],
    }


def current_doubts(parts: Services, insight: Insight, version: str) -> list[Doubt]:
    """A version's doubts about labels that are still those that it was compared with."""
    known = insight.store.doubts(version)
    return [
        doubt
        for image, label in label_stamps(parts.datastore, insight.preset, parts.instance.insights).items()
        if (doubt := known.get(image)) is not None and doubt.label == label
    ]


def describe(doubt: Doubt, rank: int) -> dict[str, Any]:
    """A doubt as plain data."""
    dice = {name: round(value, 3) for name, value in doubt.dice.items()}
    return {"rank": rank, "image": doubt.image_id, "suspicion": round(doubt.suspicion, 3), "dice": dice}
