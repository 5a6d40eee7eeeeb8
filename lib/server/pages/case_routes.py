"""``/case/{image}``: an image's page and the pictures on it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from lib.errors import NotFoundError, ParameterError
from lib.server.http.names import check_image_known
from lib.server.pages.case_view import (
    Volumes,
    as_mask,
    case_view,
    edit_model_for,
    mask_of,
    model_for,
    stack_of,
    stamp_of,
)
from lib.server.pages.drawing import draw
from lib.server.pages.sign_in import PageUser
from lib.server.pages.slices import Contour, Line, Plane, Stack, draw_slice, middle_of, reorient
from lib.server.services import Parts, Services
from lib.server.work.prefetch import PrefetchKey
from lib.storage.disk import MIB

router = APIRouter(prefix="/case", include_in_schema=False)

MOST_LAYERS = 6
SHARE_OF_EDITS = 32
LEAST_EDITS = 8
THUMBNAIL_HEIGHT = 240
PNG_HEADERS = {"Cache-Control": "private, max-age=60"}
LINES: Mapping[str, Line] = {"edit": "solid", "prediction": "solid", "label": "dashed", "compared": "dotted"}


@dataclass
class Gallery:
    """What pictures are drawn from. One prediction is computed at a time: three planes ask for it at once.

    ``edits`` are masks that clicks have made, each of which is looked at for a moment and never again.
    """

    volumes: Volumes
    edits: Volumes
    computing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class Subject:
    """The image that is drawn."""

    image: str
    path: Path
    stack: Stack
    model: str


@router.get("/{image}")
def case_page(request: Request, parts: Parts, user: PageUser, image: str) -> HTMLResponse:
    """The page of an image."""
    path = parts.image_file(check_image_known(parts.datastore, image))
    return draw(request, "case.html", user, case=case_view(parts, gallery_of(request).volumes, image, path))


@router.get("/{image}/slice.png")
async def slice_picture(
    request: Request,
    parts: Parts,
    user: PageUser,
    image: str,
    plane: Plane = "axial",
    index: Annotated[int, Query(ge=0, le=100_000)] = 0,
    layers: Annotated[str, Query(max_length=1000)] = "",
    channel: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """One slice, with the layers that are asked for: ``prediction``, ``uncertainty``, ``label:<version>`` ...

    ``channel`` is the sequence that is drawn below them, of a case that has several.
    """
    gallery = gallery_of(request)
    subject = await anyio.to_thread.run_sync(lambda: find_subject(parts, gallery, image, channel))
    names = [name for name in layers.split(",") if name]
    if len(names) > MOST_LAYERS:
        raise ParameterError("layers", layers[:200], f"at most {MOST_LAYERS}")
    contours, uncertainty = [], None
    for name in names:
        if name.startswith("edit:"):
            contours.append(outline(parts, subject, edited(gallery, image, name), "edit"))
        elif name == "uncertainty":
            uncertainty = await computed(parts, gallery, subject, "uncertainty")
        elif name == "prediction":
            contours.append(outline(parts, subject, await computed(parts, gallery, subject, "prediction"), name))
        else:
            contours.append(await anyio.to_thread.run_sync(lambda n=name: label_outline(parts, gallery, subject, n)))  # type: ignore[misc]
    content = await anyio.to_thread.run_sync(lambda: draw_slice(subject.stack, plane, index, contours, uncertainty))
    return Response(content, media_type="image/png", headers=PNG_HEADERS)


@router.get("/{image}/thumbnail.png")
def thumbnail(request: Request, parts: Parts, user: PageUser, image: str) -> Response:
    """The middle slice, with the predicted contour where the prediction is ready; nothing is computed for it."""
    gallery = gallery_of(request)
    subject = find_subject(parts, gallery, image)
    mask = kept_prediction(parts, subject) if subject.model else None
    stack = subject.stack
    middle = middle_of(mask, "axial") if mask is not None else None
    contours = [] if mask is None else [outline(parts, subject, mask, "prediction")]
    content = draw_slice(
        stack, "axial", stack.count("axial") // 2 if middle is None else middle, contours, height=THUMBNAIL_HEIGHT
    )
    return Response(content, media_type="image/png", headers=PNG_HEADERS)


def gallery_of(request: Request) -> Gallery:
    """The server's gallery, made when the first picture is asked for."""
    state = request.app.state
    if not hasattr(state, "gallery"):
        size = MIB * state.services.settings.picture_cache_mib
        state.gallery = Gallery(Volumes(size), Volumes(size // SHARE_OF_EDITS, LEAST_EDITS))
    gallery: Gallery = state.gallery
    return gallery


def find_subject(parts: Services, gallery: Gallery, image: str, channel: str = "") -> Subject:
    """Read an image of the studies, or a channel of it.

    Raises:
        NotFoundError, ForbiddenError: when it is not one.
        ImageError: when it cannot be read.
        ParameterError: when it has no such channel.
    """
    path = parts.image_file(check_image_known(parts.datastore, image))
    model = model_for(parts, image, parts.store.history.latest(image))
    return Subject(image, path, stack_of(gallery.volumes, path, parts.presets.values(), channel), model)


def outline(parts: Services, subject: Subject, mask: npt.NDArray[np.uint8], layer: str) -> Contour:
    """A mask's contour in its preset's colours."""
    model = subject.model or edit_model_for(parts, subject.image, None)
    colors = {label.index: label.color for label in parts.presets[model].labels}
    return Contour(mask, colors, LINES[layer])


def label_outline(parts: Services, gallery: Gallery, subject: Subject, layer: str) -> Contour:
    """The contour of a version of the image's label, as ``label:<version>`` or ``compared:<version>`` names it.

    Raises:
        ParameterError: for another name.
        NotFoundError: for a version that there is not.
    """
    kind, _, version_id = layer.partition(":")
    if kind not in ("label", "compared") or not version_id:
        raise ParameterError("layers", layer[:200], "prediction, uncertainty, label:<version>, compared:<version>")
    version = parts.store.history.get(version_id)
    preset = parts.presets.get(version.preset) or parts.presets.get(subject.model)
    named = {label.index: label.color for label in preset.labels} if preset is not None else {}
    colors = {value: named.get(value, (255, 255, 255)) for value in version.label_map.values()}
    return Contour(
        mask_of(gallery.volumes, version.file, subject.path, subject.stack.voxels.shape), colors, LINES[kind]
    )


def edited(gallery: Gallery, image: str, name: str) -> npt.NDArray[np.uint8]:
    """The mask that clicks have made.

    Raises:
        NotFoundError: when it is not kept any more.
    """
    mask: npt.NDArray[np.uint8] | None = gallery.edits.peek((name, image))
    if mask is None:
        raise NotFoundError("corrected mask", name[:100])
    return mask


def kept_prediction(parts: Services, subject: Subject) -> npt.NDArray[np.uint8] | None:
    """The served model's mask where it is ready, turned as the image is."""
    found = parts.infer_task(subject.model).recall(request_for(parts, subject))
    return None if found is None else take_turned(Path(found[0]))


async def computed(parts: Services, gallery: Gallery, subject: Subject, kind: str) -> Any:
    """A prediction or its uncertainty, computed when the device is free unless it is kept.

    Raises:
        ParameterError: when there is no model for the image.
        ModelNotReadyError, CheckpointError, ImageError: as an inference does.
    """
    if not subject.model:
        raise ParameterError("layers", kind, "label:<version>, since no model has weights")
    key = (kind, subject.model, parts.train_task(subject.model).serving()[0], subject.path, stamp_of(subject.path))
    async with gallery.computing:
        kept = gallery.volumes.peek(key)
        if kept is not None:
            return kept
        asked = request_for(parts, subject)
        wanted = PrefetchKey(subject.model, subject.image)
        forecast = await anyio.to_thread.run_sync(parts.forecast, subject.model, subject.path)
        async with parts.inferences.slot(what=wanted, forecast=forecast) as slot:
            made = await slot.run(lambda: compute(parts, subject, kind, asked))
        return gallery.volumes.get(key, lambda: made, lambda array: array.nbytes)


def compute(parts: Services, subject: Subject, kind: str, asked: dict[str, Any]) -> Any:
    """Run the network."""
    task = parts.infer_task(subject.model)
    if kind == "uncertainty":
        return take_turned(task.map_uncertainty(asked), np.float32)
    file, _ = task(asked)
    return take_turned(Path(str(file)))


def request_for(parts: Services, subject: Subject) -> dict[str, Any]:
    """What an inference is asked for the pictures; the same as 3D Slicer's, so that one answer serves both."""
    return {"image": str(subject.path), "result_extension": ".nii"}


def take_turned(file: Path, dtype: type = np.uint8) -> Any:
    """Read an answer's file, remove it, and reorient it as pictures are."""
    try:
        values, affine_ras = as_mask(file, dtype)
    finally:
        file.unlink(missing_ok=True)
    return reorient(values, affine_ras)
